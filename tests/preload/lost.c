/* With the real libhmm, in ordered mode: a device that does not give its pages back. What would take them along is
 * refused where the engine needs them at home, and what drops them works. */
#include "../c/device.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>

#define PAGES 4UL

static struct mm_struct *mm;
static struct test_device device;

static unsigned char *map_pages(void *at)
{
	return mmap(at, PAGES * PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED_NOREPLACE : 0), -1, 0);
}

/* Pages that begin with their number, on the device, which loses the first of them. */
static unsigned char *away(void)
{
	unsigned char *memory = map_pages(NULL);

	for (size_t page = 0; page < PAGES; page++)
		memory[page * PAGE] = (unsigned char)(page + 1);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), PAGES);
	device.lose = true;
	device.lose_only = (unsigned long)memory;
	return memory;
}

static void check_others(const unsigned char *memory)
{
	device.lose = false;
	for (size_t page = 1; page < PAGES; page++)
		CHECK_EQ(memory[page * PAGE], page + 1);
}

static void what_is_lost_never_becomes_readable_zeros(void)
{
	unsigned char *memory = away(), places[PAGES];
	int is_told = hmm_mm_capabilities(mm) & HMM_CAPABILITY_EVENTS;

	if (is_told) {
		/* Userfaultfd keeps pages away whatever their protection. */
		CHECK_EQ(mprotect(memory, PAGES * PAGE, PROT_READ), 0);
		CHECK_EQ(hmm_devmem_in_use(device.devmem), PAGES);
	} else {
		CHECK_EQ(mprotect(memory, PAGES * PAGE, PROT_READ), -1);
		CHECK_EQ(errno, EACCES);
		CHECK_EQ(hmm_residency(mm, memory, PAGES * PAGE, places, PAGES), 0);
		CHECK_EQ(places[0], HMM_RESIDENCY_POISONED);
		CHECK_EQ(places[1], HMM_RESIDENCY_SYSTEM);
	}
	check_others(memory);
	if (!is_told) {
		CHECK_EQ(mprotect(memory, 2 * PAGE, PROT_READ), -1);
		CHECK_EQ(errno, EACCES);
		CHECK_EQ(mprotect(memory + PAGE, PAGE, PROT_READ), 0);
		CHECK_EQ(memory[PAGE], 2);
	}
	CHECK_EQ(munmap(memory, PAGES * PAGE), 0);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), 0);
}

static void what_is_lost_is_not_moved_where_it_would_be_forgotten(void)
{
	unsigned char *memory = away(), *moved;

	moved = mremap(memory, PAGES * PAGE, 2 * PAGES * PAGE, MREMAP_MAYMOVE);
	if (hmm_mm_capabilities(mm) & HMM_CAPABILITY_EVENTS) {
		CHECK(moved != MAP_FAILED);
		check_others(moved);
		CHECK_EQ(munmap(moved, 2 * PAGES * PAGE), 0);
	} else {
		CHECK(moved == MAP_FAILED);
		CHECK_EQ(errno, EFAULT);
		check_others(memory);
		CHECK_EQ(munmap(memory, PAGES * PAGE), 0);
	}
	CHECK_EQ(hmm_devmem_in_use(device.devmem), 0);
}

static void what_is_dropped_need_not_come_home(void)
{
	unsigned char *memory = away();
	int faults = device.faults;

	CHECK_EQ(madvise(memory, PAGE, MADV_DONTNEED), 0);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), PAGES - 1);
	CHECK_EQ(memory[0], 0);
	CHECK_EQ(munmap(memory, PAGES * PAGE), 0);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), 0);
	CHECK_EQ(device.faults, faults);
	/* A page that is lost can be mapped anew. */
	memory = away();
	hmm_make_present(mm, memory, PAGE, false);
	device.lose = false;
	CHECK_EQ(munmap(memory, PAGES * PAGE), 0);
	CHECK(map_pages(memory) == memory);
	CHECK_EQ(memory[0], 0);
	CHECK_EQ(munmap(memory, PAGES * PAGE), 0);
}

static sigjmp_buf back;
static volatile int buses;
static void *volatile bus_at;
static unsigned char room[8192] __attribute__((aligned(4096)));
/* The signal came while another handler ran on the same stack. */
static volatile int nested;

static void on_bus(int number, siginfo_t *info, void *context)
{
	unsigned long interrupted = 0;

#ifdef __x86_64__
	interrupted = (unsigned long)((ucontext_t *)context)->uc_mcontext.gregs[REG_RSP];
#endif
	(void)number, (void)context;
	nested |= interrupted >= address(room) && interrupted < address(room) + sizeof(room);
	buses++;
	bus_at = info->si_addr;
	siglongjmp(back, 1);
}

/* Where handlers run on a stack that has room for one. */
static void a_touch_of_what_is_lost_is_one_sigbus(void)
{
	struct sigaction action = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO | SA_ONSTACK }, old;
	stack_t stack = { .ss_sp = room, .ss_size = sizeof(room) }, none = { .ss_flags = SS_DISABLE };
	unsigned char *memory = away();

	CHECK_EQ(sigaltstack(&stack, NULL), 0);
	CHECK_EQ(sigaction(SIGBUS, &action, &old), 0);
	for (int touch = 1; touch <= 3; touch++) {
		if (!sigsetjmp(back, 1))
			*(volatile unsigned char *)memory = 1;
		CHECK_EQ(buses, touch);
		CHECK(bus_at == memory);
		CHECK_EQ(nested, 0);
	}
	CHECK_EQ(sigaction(SIGBUS, &old, NULL), 0);
	CHECK_EQ(sigaltstack(&none, NULL), 0);
	check_others(memory);
	CHECK_EQ(munmap(memory, PAGES * PAGE), 0);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(what_is_lost_never_becomes_readable_zeros),
		TEST(what_is_lost_is_not_moved_where_it_would_be_forgotten),
		TEST(what_is_dropped_need_not_come_home),
		TEST(a_touch_of_what_is_lost_is_one_sigbus),
	};
	int failed;

	mm = hmm_mm_current();
	if (IS_ERR(mm)) {
		printf("1..0 # SKIP %s\n", hmm_last_error());
		return hmm_ptr_err(mm) != -EOPNOTSUPP;
	}
	test_device_open(&device, mm);
	failed = tap_run(tests, (int)(sizeof(tests) / sizeof(*tests)));
	test_device_close(&device);
	return failed;
}
