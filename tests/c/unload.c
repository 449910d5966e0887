/* A program that loads libhmm with dlopen() and lets go of it with pages away: the library stays, and so does the data. This
 * program is not linked with the library; LIBHMM is its path. */
#include "memory.h"
#include "tap.h"

#include <dlfcn.h>

#define PAGES 16UL
#define ROUNDS 3

static unsigned char *memory[ROUNDS];

/* Opens the library, sends memory away, closes the library; 1, or 0 when no engine works here. */
static int come_and_go(unsigned char *away)
{
	void *library = dlopen(LIBHMM, RTLD_NOW | RTLD_LOCAL);
	struct mm_struct *(*current)(void);
	struct hmm_soft_device *(*create)(struct mm_struct *, const struct hmm_soft_config *);
	long (*migrate)(struct hmm_soft_device *, const void *, size_t);
	struct hmm_soft_device *device;

	CHECK(library != NULL);
	if (!library)
		return 0;
	/* dlsym() returns an object pointer, which ISO C does not turn into a function. */
	*(void **)&current = dlsym(library, "hmm_mm_current");
	*(void **)&create = dlsym(library, "hmm_soft_create");
	*(void **)&migrate = dlsym(library, "hmm_soft_migrate");
	device = hmm_is_err(current()) ? NULL : create(current(), NULL);
	if (!device) {
		tap_skip_reason = "no engine works here";
		return 0;
	}
	CHECK(!hmm_is_err(device) && migrate(device, away, PAGES * PAGE) == PAGES);
	CHECK(dlclose(library) == 0);
	CHECK(dlopen(LIBHMM, RTLD_NOW | RTLD_NOLOAD) != NULL);
	return 1;
}

static void the_data_outlives_dlclose(void)
{
	for (int i = 0; i < ROUNDS; i++) {
		memory[i] = memory_map(PAGES, PROT_READ | PROT_WRITE);
		memory_fill(memory[i], PAGES);
		if (!come_and_go(memory[i]))
			return;
	}
	CHECK(memory_wrong(memory[0], PAGES) == 0);
}

/* Runs after main(): the last places are still away. */
static void at_exit(void)
{
	for (int i = 1; i < ROUNDS; i++)
		if (memory[i] && memory_wrong(memory[i], PAGES))
			_Exit(3);
}

int main(void)
{
	static const struct tap_test tests[] = { TEST(the_data_outlives_dlclose) };

	atexit(at_exit);
	return tap_run(tests, 1);
}
