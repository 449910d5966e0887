/* The forms of hmm.txt, linked with a unit that uses those of v4.17. */
#include "memory.h"

int text_form_works(struct mm_struct *mm, unsigned char *memory, size_t pages);

int text_form_works(struct mm_struct *mm, unsigned char *memory, size_t pages)
{
	unsigned long start = address(memory);
	hmm_pfn_t *pfns = calloc(pages, sizeof(*pfns));
	struct hmm_range range;
	int works;

	hmm_mm_read_lock(mm);
	works = !hmm_vma_fault(find_vma(mm, start), &range, start, start + pages * PAGE, pfns, true, true);
	works = works && (pfns[0] & HMM_PFN_WRITE) && hmm_pfn_t_to_pfn(pfns[0]) == start >> PAGE_SHIFT;
	works = works && (hmm_vma_range_done(find_vma(mm, start), &range) || !range.valid);
	hmm_mm_read_unlock(mm);
	free(pfns);
	return works;
}
