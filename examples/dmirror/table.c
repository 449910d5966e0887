/*
 * table.c - a device's page table: which page the device finds at an address, and what it may do with it.
 *
 * A device page table may forget, but it must never be wrong. What it forgets, a device fault finds again.
 *
 * Nodes come from slabs of the driver's own memory, never from the heap, and are made before the mutex is taken:
 * under it nothing is allocated. They are kept until the end; a table grows with the addresses that were ever used.
 */
#include "driver.h"

#include <errno.h>

#define LEVELS 4
#define LEVEL_BITS 9
#define SLOTS (1UL << LEVEL_BITS)
#define LAST_VPN ((1UL << (LEVELS * LEVEL_BITS)) - 1)
#define SLAB_NODES 64

struct table_node {
	union {
		struct table_node *child[SLOTS];	/* levels 3 to 1 */
		unsigned long entry[SLOTS];		/* level 0 */
		struct table_node *next;		/* a spare node; the first of a slab */
	};
};

static struct table_node *node_take(struct table *table)
{
	struct table_node *node = table->spare;

	if (node) {
		table->spare = node->next;
		node->next = NULL;
	}
	return node;
}

/* The entries of the leaf that has vpn. Missing nodes are made if make says so; NULL: there are no spare ones. */
static unsigned long *leaf_of(struct table *table, unsigned long vpn, bool make)
{
	struct table_node **place = &table->root;

	for (int level = LEVELS - 1;; level--) {
		if (!*place && make)
			*place = node_take(table);
		if (!*place)
			return NULL;
		if (!level)
			return (*place)->entry;
		place = &(*place)->child[vpn >> (level * LEVEL_BITS) & (SLOTS - 1)];
	}
}

/* More spare nodes. Called without the mutex: mapping memory may wait for anything. */
static int add_slab(struct table *table, pthread_mutex_t *mutex)
{
	struct table_node *slab = driver_map(SLAB_NODES * sizeof(*slab), MEMORY_PLAIN);

	if (!slab)
		return -ENOMEM;
	pthread_mutex_lock(mutex);
	slab->next = table->slabs;
	table->slabs = slab;
	for (int i = 1; i < SLAB_NODES; i++) {
		slab[i].next = table->spare;
		table->spare = &slab[i];
	}
	pthread_mutex_unlock(mutex);
	return 0;
}

int table_reserve(struct table *table, pthread_mutex_t *mutex, unsigned long start, unsigned long end)
{
	unsigned long vpn = start >> PAGE_SHIFT, last = (end - 1) >> PAGE_SHIFT;

	/* Nothing is mapped behind LAST_VPN, and nobody will set it. */
	while (vpn <= last && vpn <= LAST_VPN) {
		unsigned long *leaf;

		pthread_mutex_lock(mutex);
		leaf = leaf_of(table, vpn, true);
		pthread_mutex_unlock(mutex);
		if (leaf)
			vpn = (vpn | (SLOTS - 1)) + 1;
		else if (add_slab(table, mutex))
			return -ENOMEM;
	}
	return 0;
}

unsigned long table_get(const struct table *table, unsigned long addr)
{
	unsigned long vpn = addr >> PAGE_SHIFT;
	const unsigned long *leaf = vpn <= LAST_VPN ? leaf_of((struct table *)table, vpn, false) : NULL;

	return leaf ? leaf[vpn & (SLOTS - 1)] : 0;
}

void table_set(struct table *table, unsigned long addr, unsigned long entry)
{
	unsigned long vpn = addr >> PAGE_SHIFT;
	unsigned long *leaf = leaf_of(table, vpn, false);

	if (leaf)
		leaf[vpn & (SLOTS - 1)] = entry;
}

/* What is done with each entry of a range; true ends the walk. */
typedef bool visit_entry(unsigned long *entry);

/* Walks from first to last, which count from the first page that the node is about. */
static bool walk(struct table_node *node, int level, unsigned long first, unsigned long last, visit_entry *visit)
{
	int shift = level * LEVEL_BITS;

	for (unsigned long slot = first >> shift; slot <= last >> shift; slot++) {
		unsigned long from = slot << shift, to = from + (1UL << shift) - 1;

		if (!level) {
			if (visit(&node->entry[slot]))
				return true;
		} else if (node->child[slot] && walk(node->child[slot], level - 1, first > from ? first - from : 0,
						     (last < to ? last : to) - from, visit)) {
			return true;
		}
	}
	return false;
}

static bool walk_range(const struct table *table, unsigned long start, unsigned long end, visit_entry *visit)
{
	unsigned long first = start >> PAGE_SHIFT, last = (end - 1) >> PAGE_SHIFT;

	return table->root && start < end && first <= LAST_VPN &&
	       walk(table->root, LEVELS - 1, first, last < LAST_VPN ? last : LAST_VPN, visit);
}

static bool forget(unsigned long *entry)
{
	*entry = 0;
	return false;
}

static bool is_atomic(unsigned long *entry)
{
	return table_tag(*entry) == TABLE_ATOMIC;
}

void table_forget(struct table *table, unsigned long start, unsigned long end)
{
	walk_range(table, start, end, forget);
}

bool table_has_atomic(const struct table *table, unsigned long start, unsigned long end)
{
	return walk_range(table, start, end, is_atomic);
}

void table_free(struct table *table)
{
	while (table->slabs) {
		struct table_node *slab = table->slabs;

		table->slabs = slab->next;
		driver_unmap(slab, SLAB_NODES * sizeof(*slab));
	}
	table->root = table->spare = NULL;
}
