# The one extension module of ioproc: its parts, in reading order.
"""The core of ioproc in C: hooks, address spaces, replay.  Use it through the package."""
import os

import numpy as np

cimport cython
from libc.errno cimport EEXIST, EINVAL, ENOMEM, ENOSYS, ESRCH
from libc.stdint cimport int64_t as i64, uint32_t as u32, uint64_t as u64
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from ioproc.pthread cimport *
from ioproc.hooks.chain cimport *
from ioproc.hooks.interval cimport *
from ioproc.hooks.schedule cimport *
from ioproc.hooks.thread cimport *
from ioproc.vm.mm cimport *
from ioproc.vm.frames cimport *
from ioproc.vm.page_table cimport *
from ioproc.vm.vma cimport *
from ioproc.vm.rmap cimport *
from ioproc.vm.huge cimport *
from ioproc.vm.fire cimport *
from ioproc.vm.swap cimport *
from ioproc.vm.reclaim cimport *
from ioproc.vm.fault cimport *
from ioproc.vm.zap cimport *
from ioproc.vm.fork cimport *
from ioproc.vm.truth cimport *
from ioproc.nic.translation_cache cimport *
from ioproc.nic.registration_cache cimport *
from ioproc.nic.nic cimport *

include "hooks/ops.pyx"
include "vm/chains.pyx"
include "vm/merge.pyx"
include "vm/mmap.pyx"
include "vm/mlock.pyx"
include "vm/protect.pyx"
include "vm/mremap.pyx"
include "vm/huge.pyx"
include "vm/nonlinear.pyx"
include "vm/device.pyx"
include "vm/lifecycle.pyx"
include "vm/pin.pyx"
include "vm/memory.pyx"
include "vm/file.pyx"
include "vm/address_space.pyx"
include "vm/check.pyx"
include "hooks/lowlevel.pyx"
include "hooks/interval.pyx"
include "hooks/schedule.pyx"
include "nic/translation_cache.pyx"
include "nic/registration_cache.pyx"
include "nic/driver.pyx"
include "nic/fault.pyx"
include "nic/register.pyx"
include "nic/attach.pyx"
include "nic/rdma.pyx"
include "nic/nic.pyx"
include "nic/context.pyx"
include "trace/replay.pyx"
