/* A history with a little of everything, recorded in two ways by test_trace_ways.py.  argv[1]: a program to execute. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };

static volatile char sink;

static char *map(size_t pages, int prot, int flags, int fd)
{
	char *p = mmap(NULL, pages * PAGE, prot, flags, fd, 0);
	if (p == MAP_FAILED)
		abort();
	return p;
}

static void *thread(void *area)
{
	for (int i = 0; i < 32; i++)
		((char *)area)[i * PAGE] = 1;
	return NULL;
}

int main(int argc, char **argv)
{
	const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
	char *p = map(64, PROT_READ | PROT_WRITE, anonymous, -1);
	for (int i = 0; i < 16; i++)
		sink += p[i * PAGE];			/* read, never written */
	for (int i = 8; i < 48; i++)
		p[i * PAGE] = 1;			/* some read before */
	mprotect(p, 8 * PAGE, PROT_READ);
	mprotect(p + 16 * PAGE, 8 * PAGE, PROT_READ);
	mprotect(p + 16 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE);
	p[17 * PAGE] = 2;
	munmap(p + 40 * PAGE, 8 * PAGE);
	madvise(p + 24 * PAGE, 4 * PAGE, MADV_DONTNEED);
	p[25 * PAGE] = 3;
	p = map(8, PROT_READ | PROT_WRITE, anonymous, -1);
	p[0] = 1;
	map(1, PROT_READ, anonymous, -1);
	p = mremap(p, 8 * PAGE, 128 * PAGE, MREMAP_MAYMOVE);
	for (int i = 100; i < 120; i++)
		p[i * PAGE] = 1;

	int fd = memfd_create("m", 0);
	ftruncate(fd, 16 * PAGE);
	char *shared = map(16, PROT_READ | PROT_WRITE, MAP_SHARED, fd), *own = map(16, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
	for (int i = 0; i < 8; i++)
		shared[i * PAGE] = 1;
	for (int i = 0; i < 8; i++)
		own[2 * i * PAGE] = 2;

	int segment = shmget(IPC_PRIVATE, 5 * PAGE, IPC_CREAT | 0600);
	char *attached = shmat(segment, NULL, 0);
	shmctl(segment, IPC_RMID, NULL);
	attached[PAGE] = 1;

	char *heap = malloc(300 * 1024);
	memset(heap, 1, 300 * 1024);
	sbrk(64 * PAGE);
	sbrk(-64 * PAGE);

	char *area = map(32, PROT_READ | PROT_WRITE, anonymous, -1);
	pthread_t id;
	pthread_create(&id, NULL, thread, area);
	pthread_join(id, NULL);

	/* The kernel writes here first, and there after the program has read it. */
	int zero = open("/dev/zero", O_RDONLY);
	char *buffer = map(16, PROT_READ | PROT_WRITE, anonymous, -1);
	sink += buffer[12 * PAGE];
	read(zero, buffer, 8 * PAGE);
	read(zero, buffer + 12 * PAGE, PAGE);
	for (int i = 0; i < 16; i++)
		buffer[i * PAGE] = 1;

	fflush(NULL);
	pid_t child = fork();
	if (!child) {
		for (int i = 100; i < 110; i++)
			p[i * PAGE] = 5;
		sink += shared[10 * PAGE];
		munmap(area, 32 * PAGE);
		if (argc > 1)
			execl(argv[1], argv[1], NULL);
		_exit(0);
	}
	waitpid(child, NULL, 0);
	for (int i = 100; i < 120; i++)
		p[i * PAGE] = 6;
	if (!vfork())
		_exit(0);
	shmdt(attached);
	mlock(buffer, 4 * PAGE);
	msync(shared, 16 * PAGE, MS_SYNC);
	munlock(buffer, 4 * PAGE);
	return 0;
}
