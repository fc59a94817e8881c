/* Preloaded: the n-th allocation that comes from one library fails, and with `on` all that follow; and what it holds is counted. */
#include <errno.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), __libc_free(void *);

static char *begin, *end;
static long left, failed, further, live;

void failing_from(void *low, void *high) { begin = low; end = high; }
void failing_at(long n, long on) { left = n; failed = 0; further = on; }
long failing_failed(void) { return failed; }
long failing_live(void) { return live; }

static int ours(void *caller) { return (char *) caller >= begin && (char *) caller < end; }

static int fails(void *caller) {
    if (!ours(caller) || left == 0)
        return 0;
    if (left > 1) {
        left--;
        return 0;
    }
    if (!further)
        left = 0;
    failed++;
    errno = ENOMEM;
    return 1;
}

static void *counted(void *caller, void *p) {
    live += p && ours(caller);
    return p;
}

#define CALLER __builtin_return_address(0)
void *malloc(size_t n) { return fails(CALLER) ? NULL : counted(CALLER, __libc_malloc(n)); }
void *calloc(size_t n, size_t size) { return fails(CALLER) ? NULL : counted(CALLER, __libc_calloc(n, size)); }
void *realloc(void *p, size_t n) {
    void *moved = fails(CALLER) ? NULL : __libc_realloc(p, n);
    return p ? moved : counted(CALLER, moved);
}
void free(void *p) {
    live -= p && ours(CALLER);
    __libc_free(p);
}
