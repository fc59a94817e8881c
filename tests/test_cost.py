"""Costs: every constant a named parameter with unit, default and source; modelled time is counts times parameters."""
import copy
import ctypes
import dataclasses
import errno
import math
import pickle
from types import SimpleNamespace

import pytest

from ioproc import Cost, cost
from ioproc.cost import COMPONENTS, GRADES, OPTIONS, PRESETS

NAMES = [parameter.name for parameter in Cost().parameters()]


def value_of(where, name):
    return next(parameter for parameter in where.parameters() if parameter.name == name)


# What a parameter is

def test_every_parameter_has_a_unit_a_component_counts_a_grade_and_a_source():
    for preset in PRESETS:
        for parameter in Cost.of(preset).parameters():
            assert parameter.unit in ("ns", "ns/page", "ns/byte", "ns/entry")
            assert parameter.component in COMPONENTS
            assert parameter.counts
            assert parameter.grade in GRADES and parameter.source
            assert parameter.value == getattr(Cost.of(preset), parameter.name)


def test_what_is_from_memory_is_an_option_and_never_a_default():
    for preset in PRESETS:
        assert all(parameter.grade not in ("M", "-") for parameter in Cost.of(preset).parameters())
    for option, figures in OPTIONS.items():
        assert {value_of(Cost.of(f"modern+{option}"), name).grade for name in figures} == {"M"}


def test_the_figures_of_the_sources():
    modern = Cost()
    one_page = {"registrations": 1, "registered_pages": 1, "preloaded": 1}
    assert modern.model(one_page)["total"] == pytest.approx(16_000 + 4096 * 0.06, abs=0.1)                  # UCX
    assert 90 <= modern.regcache_ns <= 180
    assert (modern.nic_fault_ns, modern.invalidate_ns) == (10_500, 4_200)                                   # SVA; Vesely
    odp = Cost.of("connectx-odp")
    assert odp.model({"faults": 1})["total"] == 220_000                                                    # ASPLOS 2017
    assert odp.model({"faults": 1, "prefaulted": 1023})["total"] == pytest.approx(350_000, rel=1e-3)
    assert 3_500 <= Cost.of("np-rdma").nic_fault_ns <= 5_700
    myrinet = Cost.of("myrinet-2005")                                                                       # Tezuka
    assert 1 / (1 / 108.8 + myrinet.model(one_page)["total"] / 4096 / 1000) == pytest.approx(78.7, rel=1e-3)
    assert Cost.of("qsnet").model({"registrations": 5, "registered_pages": 100})["registration"] == 0
    assert Cost.of("modern+infiniband-2003").model(one_page)["total"] == pytest.approx(7_420 + 770, abs=1)


# Descriptions

def test_a_cost_is_a_preset_options_and_parameters():
    assert Cost.of("modern") == Cost()
    described = Cost.of("connectx-odp+iotlb-2018+infiniband-2003,walk_ns=5,load_ns=0.5")
    assert (described.nic_fault_ns, described.register_ns, described.walk_ns, described.load_ns) == (220_000, 7_420, 5, 0.5)
    assert value_of(described, "walk_ns").grade == "-"
    assert described.name == "connectx-odp+iotlb-2018+infiniband-2003,walk_ns=5,load_ns=0.5"
    assert Cost.of(described) is described


def test_a_variant_does_not_keep_the_source_of_the_value_it_replaced():
    variant = dataclasses.replace(Cost.of("connectx-odp"), nic_fault_ns=1, walk_ns=2)
    assert [value_of(variant, name)[1:5] for name in ("nic_fault_ns", "walk_ns")] == [(1, "ns", "-", "given"),
                                                                                     (2, "ns/page", "-", "given")]


@pytest.mark.parametrize("description, told", [
    ("", "no preset ''; there are modern, "), ("ethernet", "no preset 'ethernet'"), ("modern+", "no option ''"),
    ("modern+qsnet", "no option 'qsnet'; there are pin-opteron-2006, "), ("modern,x_ns=1", "no parameter 'x_ns'"),
    ("modern,name=5", "no parameter 'name'"), ("modern,walk_ns", "walk_ns must be a number of ns, not ''"),
    ("modern,walk_ns=fast", "not 'fast'"), ("modern,walk_ns=nan", "walk_ns = nan"), ("modern,walk_ns=-1", "walk_ns = -1.0"),
])
def test_a_wrong_description_says_what_is_wrong(description, told):
    with pytest.raises(ValueError) as error:
        Cost.of(description)
    assert told in str(error.value)


@pytest.mark.parametrize("value, kind", [("1", TypeError), (None, TypeError), (True, TypeError), (1j, TypeError),
                                         (math.nan, ValueError), (math.inf, ValueError), (-0.5, ValueError)])
@pytest.mark.parametrize("name", ["callback_ns", "copy_byte_ns"])
def test_a_wrong_value_names_the_parameter(name, value, kind):
    with pytest.raises(kind, match=f"{name} = "):
        Cost(**{name: value})


def test_a_cost_must_be_a_cost_or_a_string():
    with pytest.raises(TypeError, match="cost = 5"):
        Cost.of(5)


def test_costs_do_not_change_and_can_be_copied():
    one = Cost.of("np-rdma")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.walk_ns = 3
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert other == one and other.parameters() == one.parameters() and hash(other) == hash(one)


# The model

@pytest.mark.parametrize("name", NAMES)
def test_a_component_is_counts_times_parameters(name):
    """Each parameter alone: with all others zero, its component is its counts times it, and every other is zero."""
    alone = Cost(**dict.fromkeys(NAMES, 0) | {name: 3.0})
    parameter = value_of(alone, name)
    counts = {count: 10 ** i for i, count in enumerate(parameter.counts)}
    everything = {count: 1 for one in alone.parameters() for count in one.counts} | counts
    modelled = alone.model(everything)
    assert modelled == dict.fromkeys(COMPONENTS, 0.0) | {parameter.component: 3.0 * sum(counts.values()),
                                                         "total": 3.0 * sum(counts.values())}


def test_a_component_is_the_sum_over_its_parameters():
    modelled = Cost(register_ns=100, register_page_ns=10, deregister_ns=7, deregister_page_ns=1, regcache_ns=0.5).model(
        {"registrations": 2, "registered_pages": 8, "deregistrations": 1, "deregistered_pages": 4, "regcache_hits": 9,
         "regcache_misses": 1, "violations": 5, "bytes": 1 << 30})
    assert modelled["registration"] == 2 * 100 + 8 * 10 + 7 + 4 + 10 * 0.5 == modelled["total"]


def test_nothing_costs_nothing():
    assert Cost().model({}) == dict.fromkeys([*COMPONENTS, "total"], 0.0)


def test_it_prints_as_a_table():
    lines = str(Cost.of("modern+iotlb-2018")).splitlines()
    assert lines[0].split() == ["parameter", "value", "unit", "grade", "source"]
    assert len(lines) == 1 + len(NAMES)
    assert ["walk_ns", "330", "ns/page", "M"] == next(line for line in lines if line.startswith("walk_ns")).split()[:4]


# This machine

def test_machine_is_measured_by_io_uring_fixed_buffers():
    try:
        machine = Cost.of("machine")
    except OSError as error:
        pytest.skip(error.strerror)
    for name in ("register_ns", "register_page_ns", "deregister_ns", "deregister_page_ns", "copy_byte_ns"):
        assert value_of(machine, name).grade == "O"
    assert 1 < machine.deregister_page_ns < machine.register_page_ns < 10_000
    assert 0.001 < machine.copy_byte_ns < 10
    assert Cost.of("machine") == machine                        # measured once
    assert machine.nic_fault_ns == Cost().nic_fault_ns          # what is not measured is as in modern


def test_the_line_through_the_times():
    pages = [1, 4, 16, 64, 256, 1024]
    assert cost._line(pages, cost.np.array([500.0 + 80 * n for n in pages])) == pytest.approx((500, 80))
    assert cost._line(pages, cost.np.array([80.0 * n - 20 for n in pages]))[0] == 0


def test_machine_without_io_uring_is_a_clear_error(monkeypatch):
    class Refused:
        restype = None

        def __call__(self, *arguments):
            ctypes.set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: SimpleNamespace(syscall=Refused()))
    cost._machine.cache_clear()
    with pytest.raises(PermissionError, match="io_uring_setup: Operation not permitted; take another preset"):
        Cost.of("machine")
