"""A device that writes into one page follows that page; registered on the page's VMA, it hears of nothing else."""
from device import CompletionQueue

import ioproc

PAGE = 4096
mem = ioproc.PhysicalMemory(frames=64)

with ioproc.AddressSpace(mem) as mm:
    heap = mm.mmap(16 * PAGE)
    queue = CompletionQueue(heap + 4 * PAGE)
    mm.register_ops(ioproc.Ops(queue.capsule(), name="completions"), heap + 4 * PAGE, PAGE)

    mm.touch(heap, 16 * PAGE, write=True)
    print("sixteen pages written, calls:", queue.calls)
    assert queue.frame == mm.pagemap(queue.addr, 1)["pfn"][0]

    before = queue.frame
    child = mm.fork()
    print("after fork writable:", queue.writable)
    mm.write(queue.addr, b"done")
    print("after the copy the frame is another:", queue.frame != before, "and writable:", queue.writable)
    child.exit()

    mm.munmap(heap, 16 * PAGE)
    print("after munmap:", queue.frame)
