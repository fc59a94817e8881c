"""A small NIC over model.py's address spaces, written to be read: what ioproc's must agree with.

A NIC has translations of its contexts' pages, and each context a driver that loads them: by faults, update hooks or
registrations. Bytes are moved by what is translated, right or not; the oracle compares each translation with the page table as
it is used.
"""
import itertools
from collections import Counter, namedtuple

import model
from model_memory import HUGE, PAGE, AccessError, BusError, Pte, align, chunks, operation
from model_vma import TASK_SIZE, Flag

Violation = namedtuple("Violation", "address write kind design")
Word = namedtuple("Word", "frame writable unused", defaults=[False])       # a translation; unused: loaded by a hook, so far

PACKET = 65536                                      # bytes that go from one NIC to another at once
BOUNCE = TASK_SIZE                                  # where the NIC has its bounce buffers
PLACEMENTS = {"fault": ("mm", "vma", "interval"), "preload": ("mm", "vma"), "preload-registered": ("mm", "vma", "interval"),
              "pin": ("none",), "pin-cache": ("none",), "pin-cache+hooks": ("mm", "vma", "interval"), "bounce": ("none",)}


class RemoteAccessError(Exception):
    def __init__(self, address, cause):
        super().__init__(f"{cause} at {address:#x}")
        self.address, self.cause, self.completed = address, cause, 0


def cause_of(error, mm=None):
    """Why a processor's access failed, in the device's words; `mm`: it was one, and not the driver's."""
    if isinstance(error, BusError):
        return "beyond the file"
    if isinstance(error, MemoryError):
        return "out of memory"
    return "permission" if mm and mm.find(error.address) else "unmapped"


class Followed(model.MM):
    """An address space with devices: interval notifiers, and what they want of fork and exit."""

    def devices(self, **traits):
        return [context for context in self.contexts if all(getattr(context, name) == value for name, value in traits.items())]

    def fire(self, kind, vma, start, *rest):
        super().fire(kind, vma, start, *rest)
        if kind in ("invalidate_range", "change_protection"):
            self.bracket(start, rest[0])
        elif kind == "invalidate_page":
            self.bracket(start, start + vma.page_size)

    def _fire_unmap(self, vmas, start, end):
        super()._fire_unmap(vmas, start, end)
        self.bracket(start, end)

    def bracket(self, start, end):
        for context in self.devices(placement="interval"):
            told = {(a, b) for a, b in context.intervals if a < end and start < b}
            context.told_of |= told
            for a, b in sorted(told):
                context.invalidate(max(a, start), min(b, end))

    def _copy_pages(self, vma, child):
        self.bracket(vma.start, vma.end)
        super()._copy_pages(vma, child)

    def _precopy(self, vma, page, child):
        contexts = [context for context in self.devices(fork="precopy") if context.precopies(page, page + vma.page_size)]
        if contexts:
            frame = self.mem.allocate_huge(False) if vma.huge else self.mem.with_room(self.mem.allocate)
            if frame is None:
                raise MemoryError("no huge page")
            if page not in self._present(page, page + PAGE):        # it went to swap, to make room for its copy
                self.mem.release(frame)
                return True
            frame.data[:] = self.ptes[page].frame.data
            child._set(page, Pte(frame, True, True, young=False, exclusive=True))
            contexts[0].counts["precopied"] += vma.page_size // PAGE
        return bool(contexts)

    def tear_down(self):
        self.bracket(0, TASK_SIZE)
        super().tear_down()
        for context in self.contexts[:]:        # those that no hook has told
            context.end()

    def fork(self):
        heirs = [(context, context.regions.ranges()) for context in self.devices(fork="inherit")]
        child = super().fork()
        for context, registrations in heirs:
            context.nic.add(child, context.design).inherit(context, registrations)
        return child


class Region:
    def __init__(self, start, end, write):
        self.start, self.end, self.write = start, end, write
        self.refs, self.words = 0, None


class Regions:
    """The registration cache: disjoint regions, the longest unused first."""

    def __init__(self, context, most, most_bytes):
        self.context, self.most, self.most_bytes = context, most, most_bytes
        self.list = []

    def get(self, start, end, write):
        alone = False
        while True:
            for region in self.list:
                if region.start <= start and end <= region.end and region.write >= write:
                    self.context.counts["regcache_hits"] += 1
                    return self.hold(region)
            asked = Region(start // PAGE * PAGE, align(end), write)
            merged = None if alone else self.merged(asked)
            made = merged or asked
            try:
                self.context.register_region(made)
                break
            except RemoteAccessError:
                if not merged:
                    self.context.counts["regcache_misses"] += 1
                    raise
                alone = True
        self.context.counts["regcache_misses"] += 1
        taken_in = self.over(made.start, made.end)
        self.list = [region for region in self.list if region not in taken_in] + [self.hold(made)]
        self.discard(taken_in)
        self.evict()
        return made

    def merged(self, asked):
        """With all that overlaps or touches it, and so on; None: nothing does."""
        made, size = asked, 0
        while size < made.end - made.start:
            size = made.end - made.start
            others = [region for region in self.list if region.start <= made.end and region.end >= made.start]
            made = Region(min(region.start for region in [asked, *others]), max(region.end for region in [asked, *others]),
                          any(region.write for region in [asked, *others]))
        return made if others else None

    def hold(self, region):
        region.refs += 1
        return region

    def put(self, region):
        region.refs -= 1
        if region in self.list:
            if not region.refs:
                self.list.remove(region)
                self.list.append(region)
                self.evict()
        elif not region.refs:
            self.context.deregister_region(region)

    def ranges(self):
        return sorted((region.start, region.end, region.write) for region in self.list)

    def over(self, start, end):
        return [region for region in self.list if region.start < end and start < region.end]

    def leave(self, start, end):
        gone = self.over(start, end)
        self.list = [region for region in self.list if region not in gone]
        self.discard(gone)
        return len(gone)

    def discard(self, regions):
        """They have left; those in use are deregistered with their last put."""
        for region in regions:
            if not region.refs:
                self.context.deregister_region(region)

    def evict(self):
        while (self.most and len(self.list) > self.most
               or self.most_bytes and sum(region.end - region.start for region in self.list) > self.most_bytes):
            unused = [region for region in self.list if not region.refs]
            if not unused:
                return
            self.list.remove(unused[0])
            self.discard(unused[:1])


class NicMemory:
    """Translations, and the cache before them: each forgets what was not asked for the longest when it is full."""

    def __init__(self, entries, ways, most, huge):
        self.words = {}                                     # by (context, address, size); in the order they were asked for
        self.cache = [{} for _ in range(entries // ways)]   # sets of their keys, in that order too
        self.ways, self.most, self.huge = ways, most, huge

    def set(self, key):
        return self.cache[key[1] // key[2] % len(self.cache)]

    def load(self, context, page, word):
        size = HUGE if self.huge and word.frame.huge else PAGE
        key = context, page // size * size, size
        if key not in self.words and len(self.words) == self.most:
            oldest = next(iter(self.words))
            oldest[0].counts["evicted"] += 1
            self.drop([oldest])
        if self.words.setdefault(key, word) != word:
            self.words[key] = word
            self.set(key).pop(key, None)

    def over(self, context, start, end):
        return [key for key in self.words if key[0] is context and key[1] < end and start < key[1] + key[2]]

    def drop(self, keys):
        for key in keys:
            del self.words[key]
            self.set(key).pop(key, None)
        return len(keys)

    def restrict(self, keys):
        writable = [key for key in keys if self.words[key].writable]
        for key in writable:
            self.words[key] = self.words[key]._replace(writable=False)
            self.set(key).pop(key, None)
        return len(writable)

    def find(self, context, page):
        """The key of a page's translation, or None."""
        keys = (context, page, PAGE), (context, page // HUGE * HUGE, HUGE)
        return next((key for key in keys if key in self.words), None)

    def ask(self, context, page, again):
        """The translation for an access, or None; `again`, once the driver has answered."""
        key, counts = self.find(context, page), context.counts
        hit = key is not None and key in self.set(key)
        counts.update({} if again else {"lookups": 1, "hits": hit, "misses": not hit, "walks": key is not None and not hit})
        if key is None:
            return None
        if not hit:
            counts["useful"] += self.words[key].unused
            self.words[key] = self.words.pop(key)._replace(unused=False)
            if len(self.set(key)) == self.ways:
                del self.set(key)[next(iter(self.set(key)))]
        self.set(key).pop(key, None)
        self.set(key)[key] = True
        return self.words[key]


class Context:
    def __init__(self, nic, mm, design):
        self.nic, self.mm, self.mem, self.design = nic, mm, mm.mem, design
        self.placement, self.translation, self.fork, self.prefault, *limits, bounce = design
        self.memory, self.gone = nic.memory, False
        self.intervals, self.told_of = [], set()      # those followed; those told since a NIC fault began to look
        self.caches = self.translation in ("preload-registered", "pin-cache", "pin-cache+hooks")
        self.regions = Regions(self, *limits)
        self.counts, self.noted = Counter(), []
        nic.ever.append(self)
        self.bounce = self.bounce_frames(align(bounce) // PAGE) if self.translation == "bounce" else []
        if self.bounce:
            self.counts.update(registrations=1, registered_pages=len(self.bounce))
            self.pin(len(self.bounce))
        for number, frame in enumerate(self.bounce):
            self.load(BOUNCE + number * PAGE, Word(frame, True))
        if not isinstance(mm, Followed):
            mm.__class__, mm.contexts = Followed, []
        mm.contexts.append(self)
        self.ops = model.Ops(**self.callbacks())
        if self.placement == "mm":
            mm.register_ops(self.ops)

    def bounce_frames(self, pages):
        frames = []
        try:
            while len(frames) < pages:
                frames.append(self.mem.with_room(self.mem.allocate))
                frames[-1].pins = 1
        except MemoryError:
            for frame in frames:
                self.mem._unpin(frame)
            raise
        return frames

    def inherit(self, parent, registrations):
        """What takes part in the parent does in its child, and is registered there too if it can be."""
        for vma in list(self.mm.list) if self.placement == "vma" else ():
            like = parent.mm.find(vma.start)
            if like and parent.ops in like.chain:
                self.mm.register_ops(self.ops, vma.start, vma.end - vma.start)
        for start, end in sorted(parent.intervals):
            self.attach_intervals(start, end)
        for start, end, write in registrations:
            try:
                self.regions.put(self.regions.get(start, end, write))
            except RemoteAccessError:
                pass

    # --- callbacks

    def callbacks(self):
        calls = {"release": lambda mm: self.told(self.end), "sync_range": lambda vma, start, end: self.told(),
                 "invalidate_range": lambda vma, start, end: self.invalidate(start, end),
                 "invalidate_page": lambda vma, addr: self.invalidate(addr, addr + self.page_size(addr)),
                 "change_protection": self.change_protection}
        if self.fork != "posted":
            calls["wrprotect_page"] = lambda vma, addr: self.restrict(addr, addr + self.page_size(addr))
        if self.translation == "preload":
            calls["update_page"] = lambda vma, addr: self.told(self.preload, addr, addr + PAGE)
            calls["update_range"] = lambda vma, start, end: self.told(self.preload, start, end)
        return calls

    def page_size(self, addr):
        return self.mm.find(addr).page_size

    def told(self, then=lambda: None, *arguments):
        self.counts["callbacks"] += 1
        then(*arguments)

    def invalidate(self, start, end):
        self.take("invalidated", self.memory.drop, start, end)

    def restrict(self, start, end):
        self.take("downgraded", self.memory.restrict, start, end)

    def take(self, kind, taken, start, end):
        """An invalidation takes from the device what it has of the range."""
        left = self.regions.leave(start, end) if self.translation == "pin-cache+hooks" else 0
        changed = taken(self.memory.over(self, start, end))
        found = bool(left or changed)
        self.counts.update({kind: changed, "callbacks": 1, "invalidations": 1, "shootdowns": found, "useful": found})

    def drop(self, start, end):
        self.memory.drop(self.memory.over(self, start, end))

    def load(self, page, word, count=None):
        self.memory.load(self, page, word)
        self.counts.update({count: 1} if count else {})

    def change_protection(self, vma, start, end, prot):
        if not prot & 1:
            self.invalidate(start, end)
        elif not prot & 2 or self.mm.find(start).flags & (Flag.HUGETLB | Flag.SHARED) == Flag.HUGETLB:      # wait for a fault
            self.restrict(start, end)
        else:
            self.told()

    def preload(self, start, end):
        for page in range(start, end, PAGE):
            pte = self.pte(page)
            if isinstance(pte, Pte) and self.mm.find(page).flags & model.ACCESS:
                self.load(page, self.word(pte, False)._replace(unused=True), "preloaded")

    def precopies(self, start, end):
        """Whether fork copies the page [start, end): something of it is registered, or the device may write to it."""
        return bool(self.regions.over(start, end)) or any(
            self.memory.words[key].writable for key in self.memory.over(self, start, end))

    def end(self):
        """The process ends, or the device leaves it."""
        if not self.gone:
            self.gone = True
            self.regions.leave(0, TASK_SIZE)
            self.drop(0, BOUNCE + len(self.bounce) * PAGE)
            self.mm.contexts.remove(self)
            del self.nic.contexts[self.mm]
            self.pin(-len(self.bounce))
            for frame in self.bounce:
                self.mem._unpin(frame)

    @operation
    def detach(self):
        if not self.gone:
            if self.placement == "mm":
                self.mm.unregister_ops(self.ops)
            elif self.placement == "vma" and any(self.ops in vma.chain for vma in self.mm.list):
                self.mm.unregister_ops(self.ops, 0, TASK_SIZE // PAGE * PAGE)
            self.end()

    # --- the driver

    def pte(self, page):
        vma = self.mm.find(page)
        return self.mm.ptes.get(page // vma.page_size * vma.page_size) if vma else None

    @staticmethod
    def word(pte, write):
        """Write only where the entry is dirty already, or the page would be taken for clean."""
        return Word(pte.frame, pte.writable and (write or pte.dirty))

    def page_in(self, page, write):
        """As get_user_pages: the entry, faulted in."""
        vma = self.mm.find(page)
        if not vma:
            raise RemoteAccessError(page, "unmapped")
        if not vma.flags & (Flag.WRITE if write else Flag.READ):
            raise RemoteAccessError(page, "permission")
        pte = self.pte(page)
        if isinstance(pte, Pte) and (pte.writable or not write):
            if write and not pte.dirty:
                pte.dirty = pte.young = True
            return pte
        if vma.device:
            raise RemoteAccessError(page, "permission")
        try:
            return self.mm._fault(page, write)[0]
        except (AccessError, MemoryError) as error:
            raise RemoteAccessError(page, cause_of(error)) from None

    def attach_intervals(self, start, end):
        """Whatever of the range has none yet."""
        at = start
        for a, b in sorted(self.intervals):
            if b <= at or a >= end:
                continue
            if at < a:
                self.follow(at, a)
            at = b
        if at < end:
            self.follow(at, end)

    def follow(self, start, end):
        self.intervals.append((start, end))
        self.counts["attachments"] += 1

    def attach_vma(self, page, start, end):
        vma = self.mm.find(page)
        if self.ops in vma.chain:
            return
        start, end = max(start, vma.start), min(end, vma.end)
        start, end = start // vma.page_size * vma.page_size, -(end // -vma.page_size) * vma.page_size
        try:
            self.mm.register_ops(self.ops, start, end - start)
        except OSError:
            raise RemoteAccessError(page, "out of memory") from None
        self.counts["attachments"] += 1

    def nic_fault(self, page, write, start, end, count="loaded"):
        """The driver loads the page, and some behind it; `start` to `end` is what takes part from now on."""
        start, end = start // PAGE * PAGE, align(end)
        if self.placement == "interval":
            self.attach_intervals(start, end)
            interval = next((a, b) for a, b in self.intervals if a <= page < b)
            words = self.look(page, write, interval[1])
            for collisions in itertools.count(1):
                if interval not in self.told_of:
                    break
                # told by what faulting it in changed: it is looked up again; in the end alone, or pages take each other's frames
                self.counts["retries"] += 1
                words = self.look(page, write, interval[1] if collisions < 2 else page + PAGE)
            for other in reversed(words):
                self.load_by_fault(other, words[other], count, page)
            return
        self.page_in(page, write)
        if self.placement == "vma":
            self.attach_vma(page, start, end)
        for other in self.behind(page, TASK_SIZE):
            try:
                pte = self.page_in(other, write)
            except RemoteAccessError:
                break
            if self.placement == "vma" and self.ops not in self.mm.find(other).chain:
                break
            self.load_by_fault(other, self.word(pte, write), count, page)
        # with frames short, the others may have taken its own
        self.load_by_fault(page, self.word(self.page_in(page, write), write), count, page)

    def load_by_fault(self, page, word, count, asked):
        self.load(page, word, count)
        self.counts["prefaulted"] += count == "loaded" and page != asked

    def look(self, page, write, limit):
        """What is to be loaded, if nothing comes between."""
        self.told_of = set()
        words = {page: self.word(self.page_in(page, write), write)}
        try:
            for other in self.behind(page, limit):
                words[other] = self.word(self.page_in(other, write), write)
        except RemoteAccessError:
            pass
        return words

    def behind(self, page, limit):
        """What a fault loads besides."""
        return range(page + PAGE, min(limit, self.mm.find(page).end, page + self.prefault * PAGE), PAGE)

    # --- registrations

    def register_region(self, region):
        if self.translation.startswith("pin"):
            self.pin_region(region)
        else:
            for page in range(region.start, region.end, PAGE):
                self.nic_fault(page, region.write, region.start, region.end, "preloaded")
        self.count_region("", region)

    def count_region(self, kind, region):
        pages = (region.end - region.start) // PAGE
        self.counts[kind + "registrations"] += 1
        self.counts[kind + "registered_pages"] += pages

    def pin_region(self, region):
        if self.placement == "interval":
            self.attach_intervals(region.start, region.end)
        region.words = {}
        try:
            for page in range(region.start, region.end, PAGE):
                vma = self.mm.find(page)
                if vma and vma.device:
                    raise RemoteAccessError(page, "permission")
                # for writing where the mapping allows it, so that no later write parts page and address
                write = region.write or bool(vma and vma.flags & Flag.WRITE and not vma.flags & Flag.SHARED)
                pte = self.page_in(page, write)
                if self.placement == "vma":
                    self.attach_vma(page, region.start, region.end)
                region.words[page] = self.word(pte, write)
                pte.frame.pins += pte.frame.counted
        except RemoteAccessError:
            self.unpin(region)
            raise
        for page, word in region.words.items():
            self.load(page, word, "preloaded")
        self.pin(len(region.words))

    def pin(self, pages):
        """So many more are."""
        self.counts["pinned"] += pages
        self.nic.peak = max(self.nic.peak, sum(context.counts["pinned"] for context in self.nic.ever))

    def unpin(self, region):
        for word in region.words.values():
            if word.frame.counted:
                self.mm.mem._unpin(word.frame)

    def deregister_region(self, region):
        for page in range(region.start, region.end, PAGE):
            if not any(other.start <= page < other.end for other in self.regions.list):
                self.drop(page, page + PAGE)
        self.count_region("de", region)
        if region.words is not None:
            self.pin(-len(region.words))
            self.unpin(region)

    # --- transfers

    def translate(self, page, write, start, end, region=None):
        for again in itertools.count():
            word = self.memory.ask(self, page, again)
            if word and (word.writable or not write):
                break
            self.counts["faults"] += not again
            if page >= BOUNCE:
                self.load(page, Word(self.bounce[(page - BOUNCE) // PAGE], True), "loaded")
            elif region:
                self.load(page, region.words[page], "loaded")
            else:
                self.nic_fault(page, write, start, end)
        if page < BOUNCE:
            self.audit(page, word, write)
        return word

    def audit(self, page, word, write):
        pte = self.pte(page)
        if not isinstance(pte, Pte) or pte.frame is not word.frame:
            kind = "frame"
        elif not self.mm.find(page).flags & model.ACCESS or write and not pte.writable:
            kind = "permission"
        else:
            return
        self.counts["violations"] += 1
        self.counts["violations_" + kind] += 1
        self.noted.append((page, write, kind))

    def over(self, addr, length, write, region=None):
        """The pieces of a transfer, page by page: memory, and where it is."""
        for at, n in chunks(addr, length):
            page = at // PAGE * PAGE
            frame = self.translate(page, write, addr, addr + length, region).frame
            yield frame, memoryview(frame.data)[at % len(frame.data):][:n], at

    def over_bounced(self, addr, length, write):
        for start, part in self.bounces(addr, length):
            for page in range(BOUNCE, BOUNCE + part, PAGE):
                self.translate(page, write, start, start + part)
            for at, n in chunks(start, part):
                try:
                    frame = self.mm._fault(at, write)[0].frame
                except (AccessError, MemoryError) as error:
                    raise RemoteAccessError(at, cause_of(error, self.mm)) from None
                self.counts["copied_bytes"] += n
                yield frame, memoryview(frame.data)[at % len(frame.data):][:n], at

    def bounces(self, addr, length):
        size = len(self.bounce) * PAGE
        for done in range(0, length, size):
            yield addr + done, min(size, length - done)

    def check_attached(self, addr):
        if self.gone:
            self.counts["regcache_misses"] += self.caches
            raise RemoteAccessError(addr, "detached")

    def pieces(self, addr, length, write):
        self.check_attached(addr)
        if self.translation == "bounce":
            yield from self.over_bounced(addr, length, write)
        elif self.translation in ("fault", "preload"):
            yield from self.over(addr, length, write)
        else:
            region = Region(addr // PAGE * PAGE, align(addr + length), write)
            if self.caches:
                region = self.regions.get(addr, addr + length, write)
            else:
                self.register_region(region)
            try:
                yield from self.over(addr, length, write, region if region.words is not None else None)
            finally:
                self.regions.put(region) if self.caches else self.deregister_region(region)

    @operation
    def transfer(self, addr, length, write, each=lambda frame, piece, at: None):
        """`each` piece, and all counts."""
        if addr + length > TASK_SIZE:
            raise ValueError("beyond the address space")
        done = 0
        self.counts["transfers"] += length > 0
        pieces = self.pieces(addr, length, write) if length else iter(())
        try:
            for frame, piece, at in pieces:
                each(frame, piece, at)
                done += len(piece)
        except RemoteAccessError as error:
            error.completed = done
            error.address = addr + (done or self.accessible(addr, length, write, error.cause))
            self.counts["errors"] += 1
            raise
        finally:
            self.counts["bytes"] += done

    def accessible(self, addr, length, write, cause):
        """A registration fails as a whole: where the mappings do not allow it."""
        at = addr
        while not self.gone and cause in ("unmapped", "permission") and at < addr + length:
            vma = self.mm.find(at)
            if not vma or not vma.flags & (Flag.WRITE if write else Flag.READ):
                return at - addr
            at = vma.end
        return 0

    def access(self, addr, length, write=False):
        self.transfer(addr, length, write)

    def rdma_read(self, addr, n):
        data = []
        self.transfer(addr, n, False, lambda frame, piece, at: data.append(bytes(piece)))
        return b"".join(data)

    def rdma_write(self, addr, data):
        def put(frame, piece, at):
            piece[:] = data[at - addr:at - addr + len(piece)]
            if self.translation != "bounce" and frame.file:
                frame.dirty = True          # whatever the page table says; of anonymous memory it must say it
        self.transfer(addr, len(data), True, put)

    def rdma_write_to(self, addr, n, remote, remote_addr):
        """Packet by packet: what can be read goes on."""
        for at, part in chunks(0, n, PACKET):
            packet, failed, written = [], None, 0
            try:
                self.transfer(addr + at, part, False, lambda frame, piece, at, packet=packet: packet.append(bytes(piece)))
            except RemoteAccessError as error:
                failed = error
            try:
                data = b"".join(packet)
                remote.rdma_write(remote_addr + at, data)
                written = len(data)
            except RemoteAccessError as error:
                failed, written = error, error.completed
            if failed:
                failed.completed = at + written
                raise failed

    def rdma_read_from(self, addr, n, remote, remote_addr):
        remote.rdma_write_to(remote_addr, n, self, addr)

    # --- registrations that are asked for

    @operation
    def register(self, addr, length, access="rw"):
        if self.translation == "bounce":
            raise ValueError("bounce")
        write = access == "rw"
        region = Region(addr // PAGE * PAGE, align(addr + length), write)
        try:
            self.check_attached(addr)
            if self.caches:
                region = self.regions.get(region.start, region.end, write)
            else:
                self.register_region(region)
        except RemoteAccessError as error:
            size = region.end - region.start
            error.address, error.completed = region.start + self.accessible(region.start, size, write, error.cause), 0
            raise
        return Registration(self, region)


class Registration:
    def __init__(self, context, region):
        self.context, self.region, self.mem = context, region, context.mem

    @operation
    def deregister(self):
        if self.region is None:
            raise ValueError("twice")
        region, self.region = self.region, None
        self.context.regions.put(region) if self.context.caches else self.context.deregister_region(region)


class Nic:
    def __init__(self, entries, ways, *, page_shift=12, table_entries=None):
        self.contexts, self.ever, self.peak = {}, [], 0
        self.memory = NicMemory(entries, ways, table_entries, page_shift == 21)

    def attach(self, mm, placement="mm", translation="fault", *, fork="revised", prefault=1, max_regions=None, max_bytes=None,
               bounce_bytes=1 << 20):
        if mm.mm in self.contexts or placement not in PLACEMENTS[translation]:
            raise ValueError("attach")
        return self.add(mm.mm, (placement, translation, fork, prefault, max_regions, max_bytes, bounce_bytes))

    def add(self, mm, design):
        context = self.contexts[mm] = Context(self, mm, design)
        return context

    def context(self, mm):
        return self.contexts[mm.mm]

    @property
    def stats(self):
        total = sum((context.counts for context in self.ever), Counter())
        return total + Counter(pinned_peak=self.peak)
