/* Memory of special kinds: files, and huge pages that the machine keeps ready. */
#ifndef KINDS_H
#define KINDS_H

#include "fixture.h"

#include <fcntl.h>
#include <sys/utsname.h>

/* Whether the kernel tells which page is its page of zeros: since version 6.7. */
static inline bool kernel_tells_zeros(void)
{
	struct utsname name;
	unsigned int major = 0, minor = 0;

	return !uname(&name) && sscanf(name.release, "%u.%u", &major, &minor) == 2 &&
	       (major > 6 || (major == 6 && minor >= 7));
}

/* The length of a mapping of one huge page: the machine's default size, and at least 2 MiB. */
static inline size_t huge_length(void)
{
	char line[128];
	size_t kilobytes = 0;
	FILE *file = fopen("/proc/meminfo", "re");

	while (file && fgets(line, sizeof(line), file) && sscanf(line, "Hugepagesize: %zu kB", &kilobytes) != 1)
		;
	if (file)
		fclose(file);
	return kilobytes * 1024 > HUGE_SIZE ? kilobytes * 1024 : HUGE_SIZE;
}

/* A huge page; NULL, and the case is skipped, where the machine has none. */
static inline unsigned char *huge_map(void)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;
	void *memory = mmap(NULL, huge_length(), PROT_READ | PROT_WRITE, flags, -1, 0);

	if (memory != MAP_FAILED)
		return memory;
	tap_skip_reason = "there is no huge page: /proc/sys/vm/nr_hugepages";
	return NULL;
}

/* A file without a name that holds the data; -1, and the case is skipped, where /tmp can have none. */
static inline int file_of(const void *data, size_t pages)
{
	int file = open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	if (file < 0) {
		tap_skip_reason = "files without a name cannot be made in /tmp";
		return -1;
	}
	CHECK_EQ(ftruncate(file, (off_t)(pages * PAGE)), 0);
	CHECK_EQ(pwrite(file, data, pages * PAGE, 0), pages * PAGE);
	return file;
}

#endif
