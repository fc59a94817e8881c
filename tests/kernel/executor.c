/* Runs small memory-management programs on the running kernel and reports what each operation did.
 *
 * stdin:  programs, each a header (struct program) and its operations (struct op).
 * stdout: one greeting, then per program one frame: u32 byte count, then per operation a struct outcome
 *         and, for each live process, its VMAs and pages within the window.
 *
 * The controller (this process) starts one worker per address space and passes it operations through a pipe.
 * Everything is on one CPU: a page in another CPU's LRU batch has a reference that makes a write fault copy
 * where it would otherwise reuse.  The controller looks at the workers through /proc, so that looking does not
 * disturb the address spaces.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <linux/falloc.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096UL
#define MAX_PROCESSES 8
#define MAX_FILES 2
#define MAX_SEGMENTS 2
#define MAX_WINDOW 8192
#define MAX_PINS 4

enum { MMAP = 1, MUNMAP, MPROTECT, MREMAP, MADVISE, MSYNC, BRK, READ, WRITE, FORK, EXIT, FREAD, FWRITE,
       MLOCK, MUNLOCK, SHMAT, SHMDT, TRUNCATE, PUNCH, PIN, UNPIN, REMAP, SPAWN };

struct program {
    uint64_t ops, window, window_pages, start_brk, file_size[MAX_FILES], segment_size[MAX_SEGMENTS];
    uint64_t limit_as, limit_data;  /* pages, beyond what a worker itself has; 0: no limit */
    uint64_t mappings;              /* how many mappings vm.max_map_count leaves for the window; 0: as many as it does */
    uint64_t limit_memlock, limit_stack;  /* bytes, and no CAP_IPC_LOCK with the first; 0: no limit */
    uint64_t huge;                  /* whether files are of huge pages; every 512th page is reported then */
};

struct op {
    int64_t op, process, a[6];
};

/* result: the value, or -errno; STRAY: an address outside the window, unmapped again at once;
 * SIGNALLED - signal for an access that failed; SKIPPED: no such process (any more). */
#define STRAY (-5000)
#define SIGNALLED (-6000)
#define SKIPPED (-7000)

struct outcome {
    int64_t result;
    uint32_t faults, processes;
};

struct vma_record {
    uint64_t start, end, offset;
    uint8_t prot, shared;
    int8_t file;  /* index (segments after files), -1: anonymous private, -2: another object (shared anonymous memory) */
    uint8_t heap;
    uint32_t pad;
};

#define KPF_WRITEBACK 8
#define STATE_PRESENT 1
#define STATE_SWAPPED 2
#define STATE_FILE 4
#define STATE_EXCLUSIVE 8
#define STATE_ZERO 16

struct page_record {
    uint64_t pfn;
    uint32_t mapcount;
    uint16_t page;
    uint16_t state;
};

struct process_record {
    uint32_t process, vmas, pages, locked, swapped, pad;  /* locked, swapped: pages of the whole process */
};

struct pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct page_region {
    uint64_t start, end, categories;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_PFNZERO (1 << 5)

#define FILLER 0x200000000000UL  /* above the window: where mappings are used up */
#ifndef MADV_COLD
#define MADV_COLD 20
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef PR_SET_THP_DISABLE
#define PR_SET_THP_DISABLE 41
#endif

static int to_worker[MAX_PROCESSES][2], from_worker[2];
static int memfd[MAX_FILES], pins[MAX_PINS + 1][2];
static ino_t memfd_inode[MAX_FILES];
static int segment[MAX_SEGMENTS];  /* of System V shared memory; -1: none */
static struct program program;
static int own_file, kpagecount = -1, kpageflags = -1, has_scan, has_pfn;
static char *scratch;  /* 64 pages of a worker, to flush its TLB with */

static struct {
    pid_t pid;
    int maps, pagemap, status;
} workers[MAX_PROCESSES];
static int started;  /* process numbers given out; a number is never used twice in a program */

static char *out;
static size_t out_len, out_room;

static void die(const char *what)
{
    fprintf(stderr, "executor: %s: %s\n", what, strerror(errno));
    for (int i = 0; i < MAX_PROCESSES; i++)
        if (workers[i].pid > 0)
            kill(workers[i].pid, SIGKILL);
    _exit(1);
}

static void emit(const void *data, size_t n)
{
    if (out_len + n > out_room) {
        out_room = (out_len + n) * 2;
        out = realloc(out, out_room);
        if (!out)
            die("realloc");
    }
    memcpy(out + out_len, data, n);
    out_len += n;
}

static int read_all(int fd, void *data, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t k = read(fd, (char *)data + done, n - done);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return -1;
        done += k;
    }
    return 0;
}

static void write_all(int fd, const void *data, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t k = write(fd, (const char *)data + done, n - done);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            _exit(1);
        done += k;
    }
}

/* ---- a worker ---- */

long load_byte(unsigned long addr), store_byte(unsigned long addr, long value);
void access_failed(void);
__asm__(".text\n"
        ".globl load_byte\nload_byte: movzbl (%rdi), %eax\n ret\n"
        ".globl store_byte\nstore_byte: movb %sil, (%rdi)\n xorl %eax, %eax\n ret\n"
        ".globl access_failed\naccess_failed: movq $-1, %rax\n ret\n");

static volatile sig_atomic_t last_signal;

static void on_signal(int sig, siginfo_t *info, void *context)
{
    greg_t *rip = &((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    (void)info;
    if (*rip != (greg_t)load_byte && *rip != (greg_t)store_byte)
        _exit(99);
    last_signal = sig;
    *rip = (greg_t)access_failed;
}

/* mprotect() to a wider protection leaves stale entries in the TLB, whose spurious faults are counted as faults. */
static void flush_tlb(void)
{
    scratch[0] = scratch[63 * PAGE] = 1;
    mprotect(scratch, 64 * PAGE, PROT_READ);
    mprotect(scratch, 64 * PAGE, PROT_READ | PROT_WRITE);
}

/* MADV_FREE, mlock and the end of locked memory leave pages in a batch, with a reference that makes a write fault copy,
 * until the next drain: MADV_COLD makes one. */
static void drain_lru(void)
{
    madvise(scratch, PAGE, MADV_COLD);
}

static int64_t access_byte(unsigned long addr, int write, long value, uint32_t *faults)
{
    struct rusage before, after;
    int64_t result = 0;

    /* after a fork: have our own pages faulted in before counting */
    last_signal = 0;
    store_byte((unsigned long)&result, load_byte((unsigned long)&result));
    getrusage(RUSAGE_THREAD, &after);
    if (write)
        flush_tlb();
    getrusage(RUSAGE_THREAD, &before);
    getrusage(RUSAGE_THREAD, &before);
    result = write ? store_byte(addr, value) : load_byte(addr);
    if (last_signal)
        return SIGNALLED - last_signal;
    getrusage(RUSAGE_THREAD, &after);
    *faults = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt;
    return result;
}

static int inside(unsigned long addr, unsigned long length)
{
    return addr >= program.window && addr + length <= program.window + program.window_pages * PAGE;
}

static int64_t placed(long addr, unsigned long length)
{
    if (addr == -1)
        return -errno;
    length = (length + PAGE - 1) & -PAGE;
    if (!inside(addr, length)) {
        munmap((void *)addr, length);
        return STRAY;
    }
    return addr;
}

static void drain(int fd)
{
    static char data[1 << 16];

    while (read(fd, data, sizeof data) > 0)
        ;
}

/* What a driver's get_user_pages() does: a reference to each page, which the pipe holds until it is drained. */
static int64_t pin(unsigned long addr, unsigned long length, int write, int slot)
{
    struct iovec range = {(void *)addr, length};

    if (write && syscall(SYS_madvise, addr, length, MADV_POPULATE_WRITE))
        return -EFAULT;
    /* all pages or none: try with a pipe that can be drained */
    ssize_t n = vmsplice(pins[MAX_PINS][1], &range, 1, SPLICE_F_NONBLOCK);
    drain(pins[MAX_PINS][0]);
    if (n != (ssize_t)length)
        return -EFAULT;
    n = vmsplice(pins[slot][1], &range, 1, SPLICE_F_NONBLOCK);
    return n == (ssize_t)length ? 0 : -ENOBUFS;
}

static int64_t run(const struct op *op, uint32_t *faults)
{
    const int64_t *a = op->a;
    long r;

    drain_lru();
    switch (op->op) {
    case MMAP:
        r = syscall(SYS_mmap, a[0], a[1], a[2], a[3], a[4] < 0 ? -1 : memfd[a[4]], a[5]);
        return placed(r, a[1]);
    case MUNMAP:
        r = syscall(SYS_munmap, a[0], a[1]);
        break;
    case MPROTECT:
        r = syscall(SYS_mprotect, a[0], a[1], a[2]);
        break;
    case MREMAP:
        r = syscall(SYS_mremap, a[0], a[1], a[2], a[3], a[4]);
        return placed(r, a[2]);
    case MADVISE:
        r = syscall(SYS_madvise, a[0], a[1], a[2]);
        break;
    case REMAP:
        r = syscall(SYS_remap_file_pages, a[0], a[1], 0, a[2], 0);
        break;
    case PIN:
        return pin(a[0], a[1], a[2], a[3]);
    case MSYNC:
        r = syscall(SYS_msync, a[0], a[1], a[2]);
        break;
    case BRK:
        return syscall(SYS_brk, a[0]);
    case MLOCK:
        r = syscall(SYS_mlock, a[0], a[1]);
        break;
    case MUNLOCK:
        r = syscall(SYS_munlock, a[0], a[1]);
        break;
    case SHMAT:
        r = syscall(SYS_shmat, segment[a[1]], a[0], a[2] ? SHM_RDONLY : 0);
        return placed(r, program.segment_size[a[1]]);
    case SHMDT:
        r = syscall(SYS_shmdt, a[0]);
        break;
    case READ:
        return access_byte(a[0], 0, 0, faults);
    case WRITE:
        return access_byte(a[0], 1, a[1], faults);
    default:
        return -ENOSYS;
    }
    return r == -1 ? -errno : r;
}

struct reply {
    int64_t result;
    uint32_t faults, pid;
};

static void worker(int number)
{
    for (;;) {
        struct op op;
        struct reply reply = {0};

        if (read_all(to_worker[number][0], &op, sizeof op))
            _exit(0);
        if (op.op == EXIT)
            _exit(0);
        if (op.op == FORK) {
            /* CLONE_PARENT: the controller is every worker's parent and waits for each */
            long pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
            if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                number = op.a[0];
                continue;
            }
            reply.result = pid < 0 ? -errno : 0;
            reply.pid = pid;
        } else {
            reply.result = run(&op, &reply.faults);
        }
        write_all(from_worker[1], &reply, sizeof reply);
    }
}

static unsigned long read_number(const char *path, const char *name)
{
    char text[1 << 14], *at;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);

    if (n < 0)
        die(path);
    close(fd);
    text[n] = 0;
    at = strstr(text, name);
    if (!at)
        die(name);
    return strtoul(at + strlen(name), NULL, 10);
}

static unsigned count_mappings(void)
{
    char text[1 << 14];
    unsigned count = 0;
    ssize_t n;
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);

    while ((n = read(fd, text, sizeof text)) > 0)
        for (ssize_t i = 0; i < n; i++)
            count += text[i] == '\n';
    close(fd);
    return count - 1;  /* vsyscall is listed, and no mapping */
}

/* Use up mappings: one, cut into pages of alternating protection. */
static void fill_mappings(uint64_t leave)
{
    uint64_t spare = read_number("/proc/sys/vm/max_map_count", "") - count_mappings() - leave;

    if (mmap((void *)FILLER, spare * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        die("filler");
    for (uint64_t i = 1; i < spare; i += 2)
        if (mprotect((void *)(FILLER + i * PAGE), PAGE, PROT_READ))
            die("filler");
}

static void set_limit(int resource, const char *name, uint64_t pages)
{
    struct rlimit limit = {.rlim_cur = (pages + read_number("/proc/self/status", name) / (PAGE / 1024)) * PAGE,
                           .rlim_max = RLIM_INFINITY};

    if (setrlimit(resource, &limit))
        die("setrlimit");
}

static void start_worker(int number)
{
    static char stack[65536];
    volatile char deep[65536];  /* the stack may not grow once RLIMIT_STACK is set */
    stack_t signal_stack = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};

    for (size_t i = 0; i < sizeof deep; i += PAGE)
        deep[i] = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGINT, SIG_IGN);
    sigaltstack(&signal_stack, NULL);
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    /* shared: no limit on data stops mprotect() from making it writable */
    scratch = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (scratch == MAP_FAILED)
        _exit(1);
    if (program.start_brk) {
        struct prctl_mm_map map = {
            .start_code = PAGE * 64, .end_code = PAGE * 65, .start_data = PAGE * 66, .end_data = PAGE * 67,
            .start_brk = program.start_brk, .brk = program.start_brk, .start_stack = program.start_brk,
            .arg_start = PAGE * 68, .arg_end = PAGE * 69, .env_start = PAGE * 70, .env_end = PAGE * 71,
            .auxv = NULL, .auxv_size = 0, .exe_fd = -1,
        };
        if (prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0)) {
            perror("executor: PR_SET_MM_MAP");
            _exit(1);
        }
    }
    if (program.mappings)
        fill_mappings(program.mappings);
    if (program.limit_as)
        set_limit(RLIMIT_AS, "VmSize:", program.limit_as);
    if (program.limit_data)
        set_limit(RLIMIT_DATA, "VmData:", program.limit_data);
    if (program.limit_stack && setrlimit(RLIMIT_STACK, &(struct rlimit){program.limit_stack, RLIM_INFINITY}))
        die("RLIMIT_STACK");
    if (program.limit_memlock) {
        struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct caps[2];
        if (setrlimit(RLIMIT_MEMLOCK, &(struct rlimit){program.limit_memlock, program.limit_memlock}) ||
            syscall(SYS_capget, &header, caps))
            die("RLIMIT_MEMLOCK");
        caps[0].effective &= ~(1U << CAP_IPC_LOCK);
        if (syscall(SYS_capset, &header, caps))
            die("CAP_IPC_LOCK");
    }
    worker(number);
}

/* ---- the controller ---- */

static void adopt(int number, pid_t pid)
{
    char path[64];

    workers[number].pid = pid;
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    workers[number].maps = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
    workers[number].pagemap = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    workers[number].status = open(path, O_RDONLY | O_CLOEXEC);
    if (workers[number].maps < 0 || workers[number].pagemap < 0 || workers[number].status < 0)
        die(path);
}

static void dismiss(int number)
{
    close(workers[number].maps);
    close(workers[number].pagemap);
    close(workers[number].status);
    if (waitpid(workers[number].pid, NULL, 0) < 0)
        die("waitpid");
    workers[number].pid = 0;
}

static unsigned report_vmas(int fd)
{
    static char text[1 << 17];
    size_t n = 0;
    unsigned count = 0;
    unsigned long end_of_window = program.window + program.window_pages * PAGE;
    char *line = text;

    if (lseek(fd, 0, SEEK_SET) < 0)
        die("maps");
    text[0] = 0;
    for (;;) {
        struct vma_record v = {0};
        char *p, *end = strchr(line, '\n');

        if (!end) {
            ssize_t k = read(fd, text + n, sizeof text - 1 - n);
            if (k < 0)
                die("maps");
            if (k == 0)
                return count;
            n += k;
            text[n] = 0;
            continue;
        }
        *end = 0;
        v.start = strtoul(line, &p, 16);
        v.end = strtoul(p + 1, &p, 16);
        if (v.start >= end_of_window)
            return count;
        line = end + 1;
        if (v.end <= program.window)
            continue;
        v.prot = (p[1] == 'r' ? PROT_READ : 0) | (p[2] == 'w' ? PROT_WRITE : 0) | (p[3] == 'x' ? PROT_EXEC : 0);
        v.shared = p[4] == 's';
        v.offset = strtoul(p + 5, &p, 16);
        while (*++p != ' ')
            ;
        unsigned long inode = strtoul(p, &p, 10);
        v.file = strstr(p, "SYSV") || inode ? -2 : -1;
        /* a segment's inode number is its id, of another count than those of files */
        for (int i = 0; i < MAX_FILES; i++)
            if (inode && inode == memfd_inode[i] && strstr(p, "memfd:"))
                v.file = i;
        for (int i = 0; i < MAX_SEGMENTS; i++)
            if (segment[i] >= 0 && inode == (unsigned long)segment[i] && strstr(p, "SYSV"))
                v.file = MAX_FILES + i;
        v.heap = strstr(p, "[heap]") != NULL;
        emit(&v, sizeof v);
        count++;
    }
}

static unsigned report_pages(int fd)
{
    static uint64_t entries[MAX_WINDOW];
    static struct page_region regions[MAX_WINDOW];
    static uint8_t zero[MAX_WINDOW];
    unsigned count = 0, n = program.window_pages;

    if (pread(fd, entries, n * 8, program.window / PAGE * 8) != (ssize_t)(n * 8))
        die("pagemap");
    memset(zero, 0, n);
    if (has_scan) {
        struct pm_scan_arg scan = {
            .size = sizeof scan, .start = program.window, .end = program.window + n * PAGE,
            .vec = (uint64_t)regions, .vec_len = n,
            .category_mask = PAGE_IS_PFNZERO, .return_mask = PAGE_IS_PFNZERO | PAGE_IS_PRESENT,
        };
        long found = ioctl(fd, PAGEMAP_SCAN, &scan);
        if (found < 0)
            die("PAGEMAP_SCAN");
        for (long i = 0; i < found; i++)
            for (uint64_t at = regions[i].start; at < regions[i].end; at += PAGE)
                zero[(at - program.window) / PAGE] = 1;
    }
    for (unsigned i = 0; i < n; i += program.huge ? 512 : 1) {
        struct page_record record = {.page = i};
        uint64_t entry = entries[i], mapcount = 0;

        if (!(entry >> 62))
            continue;
        record.state = (entry >> 63 & 1 ? STATE_PRESENT : 0) | (entry >> 62 & 1 ? STATE_SWAPPED : 0) |
                       (entry >> 61 & 1 ? STATE_FILE : 0) | (entry >> 56 & 1 ? STATE_EXCLUSIVE : 0) |
                       (zero[i] ? STATE_ZERO : 0);
        if (entry >> 63 && has_pfn) {
            record.pfn = entry & ((1UL << 55) - 1);
            if (!zero[i] && kpagecount >= 0 && pread(kpagecount, &mapcount, 8, record.pfn * 8) == 8)
                record.mapcount = mapcount;
        }
        emit(&record, sizeof record);
        count++;
    }
    return count;
}

static void report_status(int fd, struct process_record *record)
{
    char text[1 << 12], *at;
    ssize_t n = pread(fd, text, sizeof text - 1, 0);

    if (n < 0)
        die("status");
    text[n] = 0;
    if ((at = strstr(text, "VmLck:")))
        record->locked = strtoul(at + 6, NULL, 10) / (PAGE / 1024);
    if ((at = strstr(text, "VmSwap:")))
        record->swapped = strtoul(at + 7, NULL, 10) / (PAGE / 1024);
}

static void report(int64_t result, uint32_t faults)
{
    size_t at = out_len;
    struct outcome outcome = {.result = result, .faults = faults};

    emit(&outcome, sizeof outcome);
    for (int i = 0; i < started; i++) {
        if (!workers[i].pid)
            continue;
        size_t head = out_len;
        struct process_record record = {.process = i};
        emit(&record, sizeof record);
        record.vmas = report_vmas(workers[i].maps);
        record.pages = report_pages(workers[i].pagemap);
        report_status(workers[i].status, &record);
        memcpy(out + head, &record, sizeof record);
        outcome.processes++;
    }
    memcpy(out + at, &outcome, sizeof outcome);
}

static void wait_reply(struct reply *reply)
{
    struct pollfd p = {.fd = from_worker[0], .events = POLLIN};
    siginfo_t info = {0};

    for (int tries = 0; poll(&p, 1, 100) <= 0; tries++)
        if (tries == 200 || (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid)) {
            fprintf(stderr, "executor: worker %d: status %d\n", (int)info.si_pid, info.si_status);
            errno = ETIMEDOUT;
            die("no reply");
        }
    if (read_all(from_worker[0], reply, sizeof *reply))
        die("reply");
}

/* A page on its way to the swap device cannot be reused, nor go there again: wait until it is there.  It is then in an LRU
 * batch of the CPU that heard from the device; dropping a file's cached pages while some are mapped (we run in them) drains
 * all CPUs' batches.
 */
static void wait_writeback(const uint64_t *entries, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        for (int tries = 0; entries[i] >> 63 && tries < 20000; tries++) {
            uint64_t flags = 0;
            if (pread(kpageflags, &flags, 8, (entries[i] & ((1UL << 55) - 1)) * 8) != 8 || !(flags >> KPF_WRITEBACK & 1))
                break;
            usleep(50);
        }
    posix_fadvise(own_file, 0, 0, POSIX_FADV_DONTNEED);
}

static void spawn(void)
{
    pid_t pid = fork();

    if (pid < 0)
        die("fork");
    if (pid == 0)
        start_worker(started);
    adopt(started++, pid);
}

static void perform(struct op *op)
{
    int p = op->process;
    struct reply reply;
    unsigned char byte;
    ssize_t n;

    if (op->op == FREAD || op->op == FWRITE) {
        struct stat st;
        if (fstat(memfd[op->a[0]], &st) || op->a[1] >= st.st_size) {
            report(SKIPPED, 0);
            return;
        }
        byte = op->a[2];
        if (op->op == FREAD)
            n = pread(memfd[op->a[0]], &byte, 1, op->a[1]);
        else
            n = pwrite(memfd[op->a[0]], &byte, 1, op->a[1]);
        report(n != 1 ? SKIPPED : op->op == FREAD ? byte : 0, 0);
        return;
    }
    if (op->op == TRUNCATE || op->op == PUNCH) {
        n = op->op == TRUNCATE
                ? ftruncate(memfd[op->a[0]], op->a[1])
                : fallocate(memfd[op->a[0]], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, op->a[1], op->a[2]);
        report(n ? -errno : 0, 0);
        return;
    }
    if (op->op == UNPIN) {
        drain(pins[op->a[0]][0]);
        report(0, 0);
        return;
    }
    if (op->op == SPAWN) {
        if (started == MAX_PROCESSES)
            report(SKIPPED, 0);
        else {
            spawn();
            report(0, 0);
        }
        return;
    }
    if (p < 0 || p >= started || !workers[p].pid || (op->op == FORK && started == MAX_PROCESSES)) {
        report(SKIPPED, 0);
        return;
    }
    if (op->op == FORK)
        op->a[0] = started;
    static uint64_t entries[MAX_WINDOW];
    int waits = op->op == MADVISE && op->a[2] == MADV_PAGEOUT && kpageflags >= 0 && !program.huge;
    if (waits && pread(workers[p].pagemap, entries, program.window_pages * 8, program.window / PAGE * 8) < 0)
        die("pagemap");
    write_all(to_worker[p][1], op, sizeof *op);
    if (op->op == EXIT) {
        dismiss(p);
        report(0, 0);
        return;
    }
    wait_reply(&reply);
    if (waits)
        wait_writeback(entries, program.window_pages);
    if (op->op == FORK && reply.result == 0)
        adopt(started++, reply.pid);
    report(reply.result, reply.faults);
}

static void *make_segment(int i)
{
    void *at;

    segment[i] = -1;
    if (!program.segment_size[i])
        return NULL;
    segment[i] = shmget(IPC_PRIVATE, program.segment_size[i], IPC_CREAT | 0600);
    if (segment[i] < 0)
        die("shmget");
    at = shmat(segment[i], NULL, 0);
    /* it lives as long as it is attached here: nothing is left behind, whatever happens */
    shmctl(segment[i], IPC_RMID, NULL);
    if (at == (void *)-1)
        die("shmat");
    return at;
}

static void run_program(struct op *ops)
{
    uint32_t length;
    void *attached[MAX_SEGMENTS];

    for (int i = 0; i < MAX_FILES; i++) {
        struct stat st = {0};
        memfd[i] = -1;
        memfd_inode[i] = 0;
        if (!program.file_size[i])
            continue;
        memfd[i] = memfd_create("ioproc-test", MFD_CLOEXEC | (program.huge ? MFD_HUGETLB : 0));
        if (memfd[i] < 0 || ftruncate(memfd[i], program.file_size[i]) || fstat(memfd[i], &st))
            die("memfd");
        memfd_inode[i] = st.st_ino;
    }
    for (int i = 0; i < MAX_SEGMENTS; i++)
        attached[i] = make_segment(i);
    started = 0;
    spawn();
    out_len = 0;
    emit(&length, sizeof length);
    for (uint64_t i = 0; i < program.ops; i++)
        perform(&ops[i]);
    for (int i = 0; i < started; i++)
        if (workers[i].pid) {
            kill(workers[i].pid, SIGKILL);
            dismiss(i);
        }
    for (int i = 0; i < MAX_FILES; i++)
        if (memfd[i] >= 0)
            close(memfd[i]);
    for (int i = 0; i < MAX_PINS; i++)
        drain(pins[i][0]);
    for (int i = 0; i < MAX_SEGMENTS; i++)
        if (attached[i])
            shmdt(attached[i]);
    length = out_len - sizeof length;
    memcpy(out, &length, sizeof length);
    write_all(1, out, out_len);
}

static void greet(void)
{
    volatile char *page = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    struct page_region region;
    struct pm_scan_arg scan = {
        .size = sizeof scan, .start = (uint64_t)page, .end = (uint64_t)page + PAGE, .vec = (uint64_t)&region,
        .vec_len = 1, .category_mask = PAGE_IS_PFNZERO, .return_mask = PAGE_IS_PFNZERO,
    };
    uint64_t entry = 0;

    if (page == MAP_FAILED || fd < 0)
        die("pagemap");
    (void)*page;
    has_scan = ioctl(fd, PAGEMAP_SCAN, &scan) == 1;
    if (pread(fd, &entry, 8, (uint64_t)page / PAGE * 8) != 8)
        die("pagemap");
    has_pfn = (entry & ((1UL << 55) - 1)) != 0;
    close(fd);
    munmap((void *)page, PAGE);
    if (has_pfn)
        kpagecount = open("/proc/kpagecount", O_RDONLY | O_CLOEXEC), kpageflags = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
    uint32_t greeting[4] = {0x6f696f70, has_scan, has_pfn, kpagecount >= 0};
    write_all(1, greeting, sizeof greeting);
}

int main(void)
{
    cpu_set_t one;
    int cpu = sched_getcpu();

    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (cpu < 0 || sched_setaffinity(0, sizeof one, &one))
        die("sched_setaffinity");
    if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))
        die("PR_SET_THP_DISABLE");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    own_file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (own_file < 0)
        die("/proc/self/exe");
    if (pipe2(from_worker, O_CLOEXEC))
        die("pipe");
    for (int i = 0; i < MAX_PROCESSES; i++)
        if (pipe2(to_worker[i], O_CLOEXEC))
            die("pipe");
    for (int i = 0; i <= MAX_PINS; i++)
        if (pipe2(pins[i], O_CLOEXEC | O_NONBLOCK) || fcntl(pins[i][1], F_SETPIPE_SZ, 256 * PAGE) < 0)
            die("pipe");
    greet();
    while (!read_all(0, &program, sizeof program)) {
        struct op *ops;
        if (program.window_pages > MAX_WINDOW || program.ops > 100000) {
            errno = EINVAL;
            die("program");
        }
        ops = malloc((program.ops + 1) * sizeof *ops);
        if (!ops || read_all(0, ops, program.ops * sizeof *ops))
            die("operations");
        run_program(ops);
        free(ops);
    }
    return 0;
}
