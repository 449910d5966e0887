/*
 * A word index shared by CPU and device.
 *
 * Reads text files, builds an index of their words with plain malloc (hash chains of linked nodes), and migrates its
 * pages. Then a device walks the chains by the CPU's own pointers while two CPU threads go on counting words in it, and
 * the pages keep moving. In the end every count must be what a plain run finds.
 *
 *   wordindex [FILE...]      default: the sources of this machine's Python standard library
 */
#define _GNU_SOURCE
#include <hmm.h>

#include <ctype.h>
#include <ftw.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define BUCKETS 8192u
#define MOST_TEXT (24u << 20)
#define MAP_WIDTH 72
#define MAP_ROWS 4

/* A word. Every pointer in it is an ordinary pointer, on both sides. */
struct node {
	struct node *next;       /* in its chain */
	struct node *all;        /* in the list of all nodes */
	_Atomic uint64_t count;  /* counted while pages migrate */
	uint64_t expected;       /* counted by the plain run */
	uint32_t length;
	char word[];
};

struct index {
	struct node **chains;
	struct node *all;
	size_t nodes;
	uintptr_t first, last;   /* the addresses that nodes lie in */
};

static char *text;
static size_t text_length, text_room, files;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static void fail(const char *what, long error)
{
	fprintf(stderr, "wordindex: %s: %ld (%s)\n", what, error, hmm_last_error());
	exit(1);
}

/* ---- the text ---------------------------------------------------------------------------------------------------- */

static int add_file(const char *path)
{
	FILE *file = fopen(path, "r");

	if (!file)
		return -1;
	while (text_length < MOST_TEXT) {
		size_t got;

		if (text_room - text_length < 65536) {
			text_room = text_room ? 2 * text_room : 1 << 20;
			text = realloc(text, text_room);
			if (!text)
				fail("no memory for the text", 0);
		}
		got = fread(text + text_length, 1, 65536, file);
		if (!got)
			break;
		text_length += got;
	}
	fclose(file);
	files++;
	return 0;
}

static int add_if_python(const char *path, const struct stat *status, int type, struct FTW *walk)
{
	size_t length = strlen(path);

	(void)status;
	(void)walk;
	if (type == FTW_F && length > 3 && !strcmp(path + length - 3, ".py"))
		add_file(path);
	return text_length >= MOST_TEXT;
}

static void add_python_library(void)
{
	char path[4096] = "";
	FILE *python = popen("python3 -c 'import sysconfig; print(sysconfig.get_path(\"stdlib\"))'", "r");

	if (python && fgets(path, sizeof(path), python))
		path[strcspn(path, "\n")] = 0;
	if (python)
		pclose(python);
	if (*path)
		nftw(path, add_if_python, 16, FTW_PHYS);
	if (!text_length)
		fail("no text: name some files", 0);
}

/* Finds the next word at or after *at; returns its length, 0 at the end. */
static size_t next_word(size_t *at, size_t end)
{
	size_t start;

	while (*at < end && !isalnum((unsigned char)text[*at]))
		++*at;
	start = *at;
	while (*at < end && (isalnum((unsigned char)text[*at]) || text[*at] == '_'))
		++*at;
	return *at - start;
}

/* ---- the index --------------------------------------------------------------------------------------------------- */

static unsigned int bucket_of(const char *word, size_t length)
{
	uint64_t hash = 14695981039346656037u;

	for (size_t i = 0; i < length; i++)
		hash = (hash ^ (unsigned char)word[i]) * 1099511628211u;
	return (hash >> 20) % BUCKETS;
}

static struct node *find(const struct index *index, const char *word, size_t length)
{
	struct node *node = index->chains[bucket_of(word, length)];

	while (node && (node->length != length || memcmp(node->word, word, length)))
		node = node->next;
	return node;
}

static struct node *insert(struct index *index, const char *word, size_t length)
{
	struct node *node = malloc(sizeof(*node) + length);
	unsigned int bucket = bucket_of(word, length);

	if (!node)
		fail("no memory for a word", 0);
	node->next = index->chains[bucket];
	node->all = index->all;
	atomic_init(&node->count, 0);
	node->expected = 0;
	node->length = length;
	memcpy(node->word, word, length);
	index->chains[bucket] = index->all = node;
	index->nodes++;
	if ((uintptr_t)node < index->first)
		index->first = (uintptr_t)node;
	if ((uintptr_t)node + sizeof(*node) + length > index->last)
		index->last = (uintptr_t)node + sizeof(*node) + length;
	return node;
}

/* The plain run: what every count must be in the end. */
static uint64_t build(struct index *index)
{
	uint64_t words = 0;
	size_t at = 0, length;

	index->first = UINTPTR_MAX;
	index->chains = calloc(BUCKETS, sizeof(*index->chains));
	if (!index->chains)
		fail("no memory for the index", 0);
	while ((length = next_word(&at, text_length))) {
		struct node *node = find(index, text + at - length, length);

		if (!node)
			node = insert(index, text + at - length, length);
		node->expected++;
		words++;
	}
	return words;
}

/* ---- the CPU's half ---------------------------------------------------------------------------------------------- */

struct counter {
	const struct index *index;
	size_t from, to;
	atomic_bool *done;
};

static void *count_words(void *argument)
{
	struct counter *counter = argument;
	size_t at = counter->from, length;

	/* Any of these loads and stores may touch a page that is on the device. It is home before they go on. */
	while ((length = next_word(&at, counter->to)))
		atomic_fetch_add(&find(counter->index, text + at - length, length)->count, 1);
	atomic_store(counter->done, true);
	return NULL;
}

/* ---- the device's half ------------------------------------------------------------------------------------------- */

static uint64_t walk_on_device(struct hmm_soft_device *device, const struct index *index)
{
	uint64_t visited = 0, sum = 0;
	int error = hmm_soft_chase(device, index->all, offsetof(struct node, all), UINT64_MAX, &visited);

	if (!error)
		error = hmm_soft_chase_sum_u64(device, index->all, offsetof(struct node, all),
					       offsetof(struct node, count), UINT64_MAX, &sum);
	if (error)
		fail("the device cannot walk the index", error);
	if (visited != index->nodes) {
		fprintf(stderr, "wordindex: the device met %ju of %zu nodes\n", (uintmax_t)visited,
			index->nodes);
		exit(1);
	}
	return sum;
}

static void draw_map(struct mm_struct *mm, const struct index *index)
{
	uintptr_t start = index->first & HMM_PAGE_MASK;
	size_t pages = (index->last - start + HMM_PAGE_SIZE - 1) >> HMM_PAGE_SHIFT;
	size_t cells = pages < MAP_WIDTH * MAP_ROWS ? pages : MAP_WIDTH * MAP_ROWS;
	uint8_t *places = malloc(pages);
	int error = places ? hmm_residency(mm, (void *)start, pages << HMM_PAGE_SHIFT, places, pages) : 0;

	if (!places || error)
		fail("no residency map", error);
	for (size_t cell = 0; cell < cells; cell++) {
		size_t from = cell * pages / cells, to = (cell + 1) * pages / cells, on_device = 0;

		for (size_t page = from; page < to; page++)
			on_device += places[page] == HMM_RESIDENCY_DEVICE;
		putchar(on_device == 0 ? '.' : on_device == to - from ? '#' : '+');
		if (cell % MAP_WIDTH == MAP_WIDTH - 1 || cell == cells - 1)
			putchar('\n');
	}
	free(places);
}

/* Moves the index to the device again and again, a few pages at a time, while everybody uses it. */
static size_t keep_moving(struct mm_struct *mm, struct hmm_soft_device *device, const struct index *index,
			  atomic_bool *done)
{
	const size_t step = 64 * HMM_PAGE_SIZE;
	uintptr_t at = index->first;
	size_t walks = 0;
	bool drawn = false;

	while (!atomic_load(&done[0]) || !atomic_load(&done[1])) {
		size_t length = index->last - at < step ? index->last - at : step;
		long moved = hmm_soft_migrate(device, (void *)at, length);

		if (moved < 0)
			fail("migration", moved);
		at = at + length < index->last ? at + length : index->first;
		if (walks == 1 && !drawn && at - index->first > (index->last - index->first) / 2) {
			puts("in the middle of it ('#' on the device, '.' in system memory, '+' both):");
			draw_map(mm, index);
			drawn = true;
		}
		if (at == index->first) {
			walk_on_device(device, index);
			walks++;
		}
	}
	return walks;
}

/* ---- the whole --------------------------------------------------------------------------------------------------- */

static size_t wrong_counts(const struct index *index)
{
	size_t wrong = 0;

	for (const struct node *node = index->all; node; node = node->all)
		if (atomic_load(&node->count) != node->expected && wrong++ < 5)
			fprintf(stderr, "wordindex: '%.*s' counted %ju times instead of %ju\n",
				(int)node->length, node->word, (uintmax_t)atomic_load(&node->count),
				(uintmax_t)node->expected);
	return wrong;
}

static void report(struct mm_struct *mm, struct hmm_soft_device *device)
{
	struct hmm_mm_counters mm_counters = { .size = sizeof(mm_counters) };
	struct hmm_soft_counters soft = { .size = sizeof(soft) };

	if (hmm_mm_counters(mm, &mm_counters) || hmm_soft_counters(device, &soft))
		fail("counters", 0);
	printf("  pages to the device   %10ju    pages home            %10ju\n",
	       (uintmax_t)mm_counters.migrated_to_device, (uintmax_t)mm_counters.migrated_to_system);
	printf("  CPU faults            %10ju    device faults         %10ju\n",
	       (uintmax_t)mm_counters.cpu_faults, (uintmax_t)soft.device_faults);
	printf("  invalidations         %10ju    kernels run           %10ju\n",
	       (uintmax_t)soft.invalidations, (uintmax_t)soft.jobs);
}

static void use_together(struct mm_struct *mm, struct hmm_soft_device *device, const struct index *index,
			 uint64_t words)
{
	atomic_bool done[2] = { false, false };
	size_t middle = text_length / 2;
	struct counter halves[2] = { { index, 0, 0, &done[0] }, { index, 0, text_length, &done[1] } };
	pthread_t threads[2];
	double start = now();
	size_t walks;

	while (middle < text_length && (isalnum((unsigned char)text[middle]) || text[middle] == '_'))
		middle++;
	halves[0].to = halves[1].from = middle;
	for (int i = 0; i < 2; i++)
		if (pthread_create(&threads[i], NULL, count_words, &halves[i]))
			fail("no thread", 0);
	walks = keep_moving(mm, device, index, done);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	printf("two threads counted %ju words in %.2f s while the device walked the list %zu times\n",
	       (uintmax_t)words, now() - start, walks);
	if (walk_on_device(device, index) != words) {
		fprintf(stderr, "wordindex: the device finds another sum than %ju\n", (uintmax_t)words);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	static char output[BUFSIZ];
	struct index index = { 0 };
	struct hmm_soft_config config = { .size = sizeof(config), .memory_bytes = 256u << 20, .threads = 1 };
	struct mm_struct *mm;
	struct hmm_soft_device *device;
	uint64_t words;
	long moved;
	double start;

	/* What write(2) reads from must not migrate with the heap: not every engine can make the kernel wait for it. */
	setvbuf(stdout, output, _IOLBF, sizeof(output));
	for (int i = 1; i < argc; i++)
		if (add_file(argv[i]))
			perror(argv[i]);
	if (argc == 1)
		add_python_library();
	start = now();
	words = build(&index);
	printf("%zu files, %.1f MB: %ju words, %zu different ones; plain run %.2f s\n", files,
	       text_length / 1e6, (uintmax_t)words, index.nodes, now() - start);

	mm = hmm_mm_current();
	if (IS_ERR(mm))
		fail("no address space", PTR_ERR(mm));
	device = hmm_soft_create(mm, &config);
	if (IS_ERR(device))
		fail("no device", PTR_ERR(device));
	printf("engine %s; moving the index, %.1f MB of plain malloc memory, to the device\n",
	       hmm_mm_engine(mm), (index.last - index.first) / 1e6);
	start = now();
	moved = hmm_soft_migrate(device, (void *)index.first, index.last - index.first);
	if (moved <= 0)
		fail("migration", moved);
	printf("%ld pages moved in %.1f ms\n", moved, (now() - start) * 1e3);
	draw_map(mm, &index);

	use_together(mm, device, &index, words);
	report(mm, device);
	if (wrong_counts(&index))
		return 1;
	printf("every one of %zu counts is what the plain run found\n", index.nodes);
	if (hmm_soft_destroy(device) || hmm_mm_put(mm))
		fail("closing", 0);
	return 0;
}
