"""
A registration cache kept coherent by the hooks.

Registering memory with a NIC is expensive, so communication libraries keep registrations after use.  The application
knows nothing of that: it frees a buffer, gets the same address again for other memory, and a cache that was not told
sends the old frames.  Here the address space tells it.
"""
import ioproc

PAGE = 4096


class RegistrationCache:
    """
    Parameters
    ----------
    mm : ioproc.AddressSpace
    coherent : bool
        Listen to the hooks.  Without: the bug.
    """

    def __init__(self, mm, coherent=True):
        self.mm = mm
        self.regions = {}                   # (start, end) -> frame numbers, as the NIC would keep them
        self.hits = self.misses = self.dropped = 0
        if coherent:
            mm.register_ops(ioproc.Ops(
                name="registration cache",
                invalidate_range=lambda vma, start, end: self.drop(start, end),
                invalidate_page=lambda vma, addr: self.drop(addr, addr + PAGE),
                wrprotect_page=lambda vma, addr: self.drop(addr, addr + PAGE),
                change_protection=lambda vma, start, end, newprot: self.drop(start, end),
                release=lambda mm: self.regions.clear()))

    def drop(self, start, end):
        """Forget the regions that overlap [start, end).  Runs in a callback: it only looks at its own table."""
        for region in [region for region in self.regions if region[0] < end and start < region[1]]:
            del self.regions[region]
            self.dropped += 1

    def frames(self, addr, length):
        """The frames to give to the NIC for a transfer."""
        region = addr, addr + length
        if region in self.regions:
            self.hits += 1
        else:
            self.misses += 1
            self.mm.touch(addr, length, write=True)
            self.regions[region] = self.mm.pagemap(addr, length)["pfn"].tolist()
        return self.regions[region]


def run(coherent):
    mem = ioproc.PhysicalMemory(frames=256)
    with ioproc.AddressSpace(mem) as mm:
        cache = RegistrationCache(mm, coherent)
        stale = 0
        for step in range(100):
            buffer = mm.mmap(8 * PAGE)                      # malloc: the same address every time
            scratch = mm.mmap(step % 3 * PAGE + PAGE)       # other memory, so that the frames differ
            mm.touch(scratch, PAGE, write=True)
            for _ in range(5):
                frames = cache.frames(buffer, 8 * PAGE)
                mm.touch(buffer, 8 * PAGE, write=True)
                stale += frames != mm.pagemap(buffer, 8 * PAGE)["pfn"].tolist()
            mm.munmap(buffer, 8 * PAGE)                     # free
            if step % 2:
                mm.munmap(scratch, step % 3 * PAGE + PAGE)
        print(f"{'told by the hooks' if coherent else 'not told':17}: {cache.hits} hits, {cache.misses} registrations, "
              f"{cache.dropped} dropped, {stale} transfers with wrong frames")


if __name__ == "__main__":
    run(coherent=False)
    run(coherent=True)
