/* A history of 64-byte events replayed: `replay EVENTS [repetitions | -]`, where EVENTS holds nothing but the array.
 * Private anonymous memory only; the process of each event is looked up, the lock is taken for each event. */
#include "vm.h"
#include "run.h"

enum { MMAP = 1, MUNMAP = 2, FORK = 8, EXIT = 11, FAULT = 14 };
enum { PROTECTION_WRITE = 2, PROCESSES = 64 };

typedef struct {
    uint64_t t;
    int32_t pid, tid;
    uint8_t op, access, origin, error;
    uint32_t prot, flags;
    int32_t file;
    uint64_t addr, length, arg, ret;
} event_t;
_Static_assert(sizeof(event_t) == 64, "the trace format's event");

static event_t *events;
static memory_t *mem;
static struct { int32_t pid; mm_t *mm; } processes[PROCESSES];
static unsigned n_processes;

static mm_t **process(int32_t pid)
{
    for (unsigned i = 0; i < n_processes; i++)
        if (processes[i].pid == pid)
            return &processes[i].mm;
    if (n_processes == PROCESSES)
        must(NULL);
    processes[n_processes].pid = pid;
    processes[n_processes].mm = NULL;
    return &processes[n_processes++].mm;
}

static double once(long n)
{
    uint64_t others = 0, disagreements = 0, guessed = 0;
    if (!mem)
        mem = memory_new(1 << 18);
    n_processes = 0;
    double t = now_ns();
    for (const event_t *e = events; e < events + n; e++) {
        mm_t **slot = process(e->pid), *mm = *slot ? *slot : (*slot = mm_new(mem));
        switch (e->op) {
        case FAULT: {
            int write = e->access == 2;
            if (!e->access) {
                pthread_mutex_lock(&mm->lock);
                unsigned at = vma_index(mm, e->addr);
                write = at < mm->n_vmas && mm->vmas[at]->writable;
                pthread_mutex_unlock(&mm->lock);
                guessed++;
            }
            disagreements += mm_touch(mm, e->addr & -PAGE, PAGE, write) != 1;
            break;
        }
        case MMAP:
            if (e->error)
                break;
            mm_unmap(mm, e->ret, e->length);
            mm_map(mm, e->ret, e->length, e->prot & PROTECTION_WRITE);
            break;
        case MUNMAP:
            mm_unmap(mm, e->addr, e->length);
            break;
        case FORK:
            *process((int32_t)e->arg) = mm_fork(mm);
            break;
        case EXIT:
            mm_exit(mm);
            *slot = NULL;
            break;
        default:
            others++;
        }
    }
    t = now_ns() - t;
    for (unsigned i = 0; i < n_processes; i++)
        if (processes[i].mm)
            mm_exit(processes[i].mm);
    if (others || disagreements) {
        fprintf(stderr, "replay: %lu events not supported, %lu disagreements\n", others, disagreements);
        exit(1);
    }
    return t;
}

int main(int argc, char **argv)
{
    events = read_units(argc, argv, sizeof *events);
    return run(argc, argv, once);
}
