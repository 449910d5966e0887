/*
 * shim.c - /dev/hmm_dmirror0 to 3 for a program that knows nothing of libhmm:
 *
 *   LD_PRELOAD=target/release/libhmm_dmirror.so ./hmm-tests
 *
 * This library stands between the program and libc, and serves open, ioctl, mmap and close of these four names.
 *
 * The device must also hear of munmap, mprotect and the like *before* they are made, as a kernel driver does. That is
 * the business of libhmm_preload.so, which must stand before libc, too. A plain dependency would be searched after libc;
 * so this library is linked with --auxiliary=libhmm_preload.so: the loader then puts that library directly before this
 * one, as if it had been named first in LD_PRELOAD. A call of the program goes through libhmm_preload.so, which announces
 * it, then through this file, then to libc. Nothing here takes part in it, except that HMM_LAYOUT=ordered asks libhmm to
 * have changes announced on all engines. If the loader did not find the library, opening a device says so.
 */
#define _GNU_SOURCE
/* A fortified compilation has an open() of its own. */
#undef _FORTIFY_SOURCE
#include "dmirror.h"

#include <hmm.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_OPEN 256

/* The next function of a name: libc's, or that of another library in between. */
#define NEXT(name) ((__typeof__(&name))next_of(&next_##name, #name))
#define DECLARE_NEXT(name) static void *_Atomic next_##name

static void *next_of(void *_Atomic *place, const char *name)
{
	void *found = atomic_load(place);

	if (!found) {
		found = dlsym(RTLD_NEXT, name);
		atomic_store(place, found);
	}
	return found;
}

/* ---- Descriptors ----------------------------------------------------------------------------------------------- */

/*
 * What the program gets is a real descriptor, of an empty memfd: so it can be polled, passed to fstat, closed. The memfd
 * also says whether a number is still ours: it may be closed by ways that are not seen here (close_range, dup2), and be
 * given to another file.
 */
struct open_device {
	struct dmirror *mirror;		/* NULL: the place is free */
	int descriptor;
	dev_t file_system;
	ino_t file;
	unsigned int users;		/* commands that are running */
	bool is_closed;			/* the last user closes the mirror */
};

static struct open_device open_devices[MAX_OPEN];
static atomic_uint open_count;
/* Guards the two above. Never held while a device works. */
static pthread_mutex_t open_lock = PTHREAD_MUTEX_INITIALIZER;
/* Whose table it is. A child of vfork() runs in the memory of its parent, whose devices it must leave alone. */
static pid_t process;

static void fork_begins(void)
{
	pthread_mutex_lock(&open_lock);
}

static void fork_is_over(void)
{
	pthread_mutex_unlock(&open_lock);
}

static void child_begins(void)
{
	process = getpid();
	pthread_mutex_unlock(&open_lock);
}

__attribute__((constructor)) static void begin(void)
{
	/* The program's own choice is left alone. */
	setenv("HMM_LAYOUT", "ordered", 0);
	process = getpid();
	pthread_atfork(fork_begins, fork_is_over, child_begins);
}

/* Lets go of an entry; what is to be closed now is returned. Called with the lock. */
static struct dmirror *drop(struct open_device *device)
{
	struct dmirror *mirror = device->mirror;

	if (!device->is_closed || device->users)
		return NULL;
	device->mirror = NULL;
	atomic_fetch_sub(&open_count, 1);
	return mirror;
}

static bool is_still_open(const struct open_device *device)
{
	struct stat now;

	return !fstat(device->descriptor, &now) && now.st_dev == device->file_system && now.st_ino == device->file;
}

/* The entry of a descriptor, with one user more or, to close it, marked as closed; NULL: no device of ours. */
static struct open_device *find(int descriptor, bool to_close)
{
	struct open_device *found = NULL;
	struct dmirror *gone = NULL;

	if (!atomic_load(&open_count) || getpid() != process)
		return NULL;
	pthread_mutex_lock(&open_lock);
	for (int i = 0; i < MAX_OPEN && !found; i++)
		if (open_devices[i].mirror && open_devices[i].descriptor == descriptor && !open_devices[i].is_closed)
			found = &open_devices[i];
	if (found && !is_still_open(found)) {
		found->is_closed = true;
		gone = drop(found);
		found = NULL;
	} else if (found) {
		found->users++;
		found->is_closed = to_close;
	}
	pthread_mutex_unlock(&open_lock);
	if (gone)
		dmirror_close(gone);
	return found;
}

static void put(struct open_device *device)
{
	struct dmirror *gone;

	pthread_mutex_lock(&open_lock);
	device->users--;
	gone = drop(device);
	pthread_mutex_unlock(&open_lock);
	if (gone)
		dmirror_close(gone);
}

static bool enter(int descriptor, struct dmirror *mirror)
{
	struct stat file;
	bool entered = false;

	if (fstat(descriptor, &file))
		return false;
	pthread_mutex_lock(&open_lock);
	for (int i = 0; i < MAX_OPEN && !entered; i++) {
		if (open_devices[i].mirror)
			continue;
		open_devices[i] = (struct open_device){
			.mirror = mirror,
			.descriptor = descriptor,
			.file_system = file.st_dev,
			.file = file.st_ino,
		};
		atomic_fetch_add(&open_count, 1);
		entered = true;
	}
	pthread_mutex_unlock(&open_lock);
	if (!entered)
		errno = EMFILE;
	return entered;
}

/* ---- open ------------------------------------------------------------------------------------------------------ */

DECLARE_NEXT(close);

/* The unit that a path names; -1: none. */
static int unit_of(const char *path)
{
	static const char prefix[] = "/dev/hmm_dmirror";
	const char *number = path + sizeof(prefix) - 1;

	if (!path || strncmp(path, prefix, sizeof(prefix) - 1) || *number < '0' || number[1])
		return -1;
	return *number < '0' + DMIRROR_UNITS ? *number - '0' : -1;
}

static int open_unit(int unit, int flags)
{
	struct dmirror *mirror = dmirror_open((unsigned int)unit);
	int descriptor, error;

	if (!mirror) {
		error = errno;
		fprintf(stderr, "libhmm_dmirror: /dev/hmm_dmirror%d: %s\n", unit,
			*hmm_last_error() ? hmm_last_error() : strerror(error));
		errno = error;
		return -1;
	}
	descriptor = memfd_create("hmm_dmirror", flags & O_CLOEXEC ? MFD_CLOEXEC : 0);
	if (descriptor >= 0 && enter(descriptor, mirror))
		return descriptor;
	error = errno;
	if (descriptor >= 0)
		NEXT(close)(descriptor);
	dmirror_close(mirror);
	errno = error;
	return -1;
}

/* open() and its kin take a mode only if they may create a file. */
#define MODE_AFTER(last)                                                                                           \
	({                                                                                                         \
		mode_t mode_given = 0;                                                                             \
		if ((last) & O_CREAT || ((last) & O_TMPFILE) == O_TMPFILE) {                                       \
			va_list arguments;                                                                         \
			va_start(arguments, last);                                                                 \
			mode_given = va_arg(arguments, mode_t);                                                    \
			va_end(arguments);                                                                         \
		}                                                                                                  \
		mode_given;                                                                                        \
	})

/* One function under each name that libc has for it. */
#define OPEN(name)                                                                                                 \
	DECLARE_NEXT(name);                                                                                        \
	EXPORT int name(const char *path, int flags, ...)                                                          \
	{                                                                                                          \
		mode_t mode = MODE_AFTER(flags);                                                                   \
		int unit = unit_of(path);                                                                          \
		return unit >= 0 ? open_unit(unit, flags) : NEXT(name)(path, flags, mode);                         \
	}
#define OPENAT(name)                                                                                               \
	DECLARE_NEXT(name);                                                                                        \
	EXPORT int name(int folder, const char *path, int flags, ...)                                              \
	{                                                                                                          \
		mode_t mode = MODE_AFTER(flags);                                                                   \
		int unit = unit_of(path);                                                                          \
		return unit >= 0 ? open_unit(unit, flags) : NEXT(name)(folder, path, flags, mode);                 \
	}
/* What a fortified compilation calls when there is no mode. */
#define OPEN_2(name)                                                                                               \
	int name(const char *path, int flags);                                                                     \
	DECLARE_NEXT(name);                                                                                        \
	EXPORT int name(const char *path, int flags)                                                               \
	{                                                                                                          \
		int unit = unit_of(path);                                                                          \
		return unit >= 0 ? open_unit(unit, flags) : NEXT(name)(path, flags);                               \
	}
#define OPENAT_2(name)                                                                                             \
	int name(int folder, const char *path, int flags);                                                         \
	DECLARE_NEXT(name);                                                                                        \
	EXPORT int name(int folder, const char *path, int flags)                                                   \
	{                                                                                                          \
		int unit = unit_of(path);                                                                          \
		return unit >= 0 ? open_unit(unit, flags) : NEXT(name)(folder, path, flags);                       \
	}

int __open(const char *path, int flags, ...);
int __open64(const char *path, int flags, ...);

OPEN(open)
OPEN(open64)
OPEN(__open)
OPEN(__open64)
OPENAT(openat)
OPENAT(openat64)
OPEN_2(__open_2)
OPEN_2(__open64_2)
OPENAT_2(__openat_2)
OPENAT_2(__openat64_2)

/* ---- ioctl, mmap, close ---------------------------------------------------------------------------------------- */

DECLARE_NEXT(ioctl);
EXPORT int ioctl(int descriptor, unsigned long request, ...)
{
	struct open_device *device = find(descriptor, false);
	void *argument;
	va_list arguments;
	long ret;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (!device)
		return NEXT(ioctl)(descriptor, request, argument);
	ret = dmirror_command(device->mirror, request, argument);
	put(device);
	if (!ret)
		return 0;
	errno = (int)-ret;
	return -1;
}

/* A mapping of the device, if it is one; else *is_ours becomes false. */
static void *map_device(void *addr, size_t length, int protection, int flags, int descriptor, bool *is_ours)
{
	struct open_device *device = flags & MAP_ANONYMOUS ? NULL : find(descriptor, false);
	void *mapped = MAP_FAILED;

	*is_ours = device;
	if (device) {
		mapped = dmirror_mmap(device->mirror, addr, length, protection, flags);
		put(device);
	}
	return mapped;
}

#define MMAP(name)                                                                                                 \
	DECLARE_NEXT(name);                                                                                        \
	EXPORT void *name(void *addr, size_t length, int protection, int flags, int descriptor, off_t offset)      \
	{                                                                                                          \
		bool is_ours;                                                                                      \
		void *mapped = map_device(addr, length, protection, flags, descriptor, &is_ours);                  \
		return is_ours ? mapped : NEXT(name)(addr, length, protection, flags, descriptor, offset);         \
	}

MMAP(mmap)
MMAP(mmap64)

/* The pages come home when the last command of another thread is done, as they do when the kernel's last user goes. */
EXPORT int close(int descriptor)
{
	struct open_device *device = find(descriptor, true);
	int ret = NEXT(close)(descriptor);

	if (device)
		put(device);
	return ret;
}
