/* Preloaded: the n-th allocation that comes from one library fails, and with `on` all that follow. */
#include <errno.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);

static char *begin, *end;
static long left, failed, further;

void failing_from(void *low, void *high) { begin = low; end = high; }
void failing_at(long n, long on) { left = n; failed = 0; further = on; }
long failing_failed(void) { return failed; }

static int fails(void *caller) {
    if ((char *) caller < begin || (char *) caller >= end || left == 0)
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

void *malloc(size_t n) { return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(n, size); }
void *realloc(void *p, size_t n) { return fails(__builtin_return_address(0)) ? NULL : __libc_realloc(p, n); }
