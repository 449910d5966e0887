/* With the real libhmm, in ordered mode: two threads change the layout of their memory in every way while two others
 * migrate it, and a fifth forks. Every word is checked after every change. */
#include "layout.h"

#include <sys/wait.h>
#include <time.h>

#define SLOTS 6
#define SLOT 96UL
#define SECONDS 2

/* Memory that one thread changes and everybody migrates. */
static struct slot {
	_Atomic(unsigned char *) memory;
	unsigned char *spare;
} slots[SLOTS];

static atomic_int stop;
static atomic_long changes, failures;

static uint64_t next_random(uint64_t *state)
{
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return *state >> 33;
}

#define REQUIRE(condition)                                                                     \
	do {                                                                                   \
		if (!(condition) && failures++ < 8)                                            \
			printf("# change %ld: not true: %s (%s)\n", changes, #condition, strerror(errno)); \
	} while (0)

/* A slot of its own: what is unmapped behind it keeps the kernel from joining it to a neighbour. */
static unsigned char *map_slot(void)
{
	unsigned char *mapped = map_pages(NULL, SLOT + 1, 0);

	munmap(mapped + SLOT * PAGE, PAGE);
	return mapped;
}

/* Where it was; elsewhere if somebody else has taken the place. */
static unsigned char *map_again(unsigned char *memory)
{
	unsigned char *mapped = map_pages(memory, SLOT, MAP_FIXED_NOREPLACE);

	return mapped == MAP_FAILED ? map_slot() : mapped;
}

static void unmap_and_map(struct slot *slot)
{
	REQUIRE(munmap(slot->memory, SLOT * PAGE) == 0);
	slot->memory = map_again(slot->memory);
	REQUIRE(not_zero(slot->memory, SLOT) == 0);
}

/* All of it: userfaultfd does not let the kernel join a part to its neighbours, and mremap refuses pieces. */
static void map_over(struct slot *slot)
{
	REQUIRE(map_pages(slot->memory, SLOT, MAP_FIXED) == slot->memory);
	REQUIRE(not_zero(slot->memory, SLOT) == 0);
}

static void drop_contents(struct slot *slot, uint64_t seed)
{
	REQUIRE(madvise(slot->memory + 32 * PAGE, (SLOT - 32) * PAGE, MADV_DONTNEED) == 0);
	REQUIRE(not_zero(slot->memory + 32 * PAGE, SLOT - 32) == 0);
	REQUIRE(wrong(slot->memory, 32, seed) == 0);
}

static void *move(unsigned char *from, unsigned char *to)
{
	return mremap(from, SLOT * PAGE, SLOT * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
}

static void move_and_back(struct slot *slot, uint64_t seed)
{
	unsigned char *memory = slot->memory, *spare = slot->spare;

	REQUIRE(move(memory, spare) == spare);
	REQUIRE(wrong(spare, SLOT, seed) == 0);
	/* What comes to the old place meanwhile is somebody else's. */
	if (map_pages(memory, SLOT, MAP_FIXED_NOREPLACE) == memory) {
		REQUIRE(not_zero(memory, SLOT) == 0);
		REQUIRE(move(spare, memory) == memory);
		REQUIRE(wrong(memory, SLOT, seed) == 0);
		slot->spare = map_again(spare);
	} else {
		slot->memory = spare;
		slot->spare = map_slot();
	}
}

static void protect(struct slot *slot, uint64_t seed)
{
	unsigned char *memory = slot->memory;

	REQUIRE(mprotect(memory, SLOT * PAGE, PROT_READ) == 0);
	REQUIRE(wrong(memory, SLOT, seed) == 0);
	REQUIRE(mprotect(memory + 16 * PAGE, 16 * PAGE, PROT_NONE) == 0);
	REQUIRE(mprotect(memory, SLOT * PAGE, PROT_READ | PROT_WRITE) == 0);
	REQUIRE(wrong(memory, SLOT, seed) == 0);
}

static void *change(void *argument)
{
	size_t half = (size_t)argument;
	uint64_t random = half + 1;

	while (!stop) {
		struct slot *slot = &slots[half * (SLOTS / 2) + next_random(&random) % (SLOTS / 2)];
		uint64_t seed = next_random(&random);
		struct timespec pause = { 0, (long)(next_random(&random) % 400000) };

		fill(slot->memory, SLOT, seed);
		nanosleep(&pause, NULL);
		switch (next_random(&random) % 6) {
		case 0: unmap_and_map(slot); break;
		case 1: map_over(slot); break;
		case 2: drop_contents(slot, seed); break;
		case 3: move_and_back(slot, seed); break;
		case 4: protect(slot, seed); break;
		default: REQUIRE(wrong(slot->memory, SLOT, seed) == 0);
		}
		changes++;
	}
	return NULL;
}

static void *migrate(void *argument)
{
	uint64_t random = (uint64_t)(uintptr_t)argument + 100;

	while (!stop) {
		struct slot *slot = &slots[next_random(&random) % SLOTS];
		size_t first = next_random(&random) % (SLOT - 8), pages = 8 + next_random(&random) % (SLOT - first - 7);

		/* The memory may be elsewhere by now: refused, and no harm. */
		hmm_soft_migrate(device, slot->memory + first * PAGE, pages * PAGE);
	}
	return NULL;
}

/* Children that change their own layout, while the parent's changes: nothing of the parent's concerns them. */
static void fork_all_the_while(long until)
{
	struct timespec now;
	int status = 0;

	do {
		pid_t child = fork();

		if (child == 0) {
			unsigned char *memory = map_pages(NULL, 4, 0);

			fill(memory, 4, 1);
			_exit(mprotect(memory, PAGE, PROT_READ) || munmap(memory + PAGE, PAGE) || wrong(memory, 1, 1));
		}
		CHECK_EQ(waitpid(child, &status, 0), child);
		CHECK_EQ(status, 0);
		nanosleep(&(struct timespec){ 0, 100000000 }, NULL);
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (now.tv_sec < until);
}

static void changes_and_migrations_at_once_lose_nothing(void)
{
	struct hmm_mm_counters counters = { .size = sizeof(counters) };
	struct timespec start;
	pthread_t threads[4];

	for (size_t i = 0; i < SLOTS; i++) {
		slots[i].memory = map_slot();
		slots[i].spare = map_slot();
	}
	for (size_t i = 0; i < 2; i++) {
		pthread_create(&threads[i], NULL, change, (void *)i);
		pthread_create(&threads[2 + i], NULL, migrate, (void *)i);
	}
	clock_gettime(CLOCK_MONOTONIC, &start);
	fork_all_the_while(start.tv_sec + SECONDS);
	stop = 1;
	for (size_t i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQ(failures, 0);
	CHECK_EQ(hmm_mm_counters(mm, &counters), 0);
	printf("# %ld changes, %ld pages left, %ld came home\n", changes, (long)counters.migrated_to_device,
	       (long)counters.migrated_to_system);
	CHECK(changes > 0 && counters.migrated_to_device > 0);
	for (size_t i = 0; i < SLOTS; i++) {
		munmap(slots[i].memory, SLOT * PAGE);
		munmap(slots[i].spare, SLOT * PAGE);
	}
	/* Somebody else's memory at a place that was free for a moment may have left, too: it comes home now. A page that
	 * nobody knows any more would keep the device. */
	CHECK_EQ(hmm_soft_destroy(device), 0);
	CHECK_EQ(device_pages(), 0);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(changes_and_migrations_at_once_lose_nothing),
	};

	layout_start();
	CHECK(can(HMM_CAPABILITY_ORDERED));
	return tap_run(tests, COUNT(tests));
}
