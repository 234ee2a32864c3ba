"""Tests how much host memory a process may use: the control group's limit, not the machine's."""

import pytest

from lctrain.memory.budget import free_host_bytes

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """A machine with 100 GiB available, and a folder for control groups."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {100 * GIB // 1024} kB\n")
    return tmp_path


def free(machine):
    return free_host_bytes(machine / "cgroup", machine / "meminfo", machine / "own")


def test_a_limit_of_the_control_group_counts(machine):
    group = machine / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text(f"{24 * GIB}\n")
    (group / "memory.current").write_text(f"{10 * GIB}\n")
    assert free(machine) == 14 * GIB
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {4 * GIB}\n")
    assert free(machine) == 18 * GIB  # the cache is dropped when memory is short


def test_no_limit_is_the_machine_s_memory(machine):
    group = machine / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("10\n")
    assert free(machine) == 100 * GIB


def test_the_older_control_groups(machine):
    group = machine / "cgroup" / "memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{8 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{2 * GIB}\n")
    assert free(machine) == 6 * GIB


def limit(folder, gib, used=1, names=("memory.max", "memory.current")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (gib, used), strict=True):
        (folder / name).write_text(f"{value * GIB}\n")


@pytest.mark.parametrize(
    ("own", "parent", "root", "left"),
    [(8, 50, 60, 7), (50, 8, 60, 7), (50, 60, 8, 7)],
    ids=["own", "parent", "root"],
)
@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_the_process_s_groups_counts(
    machine, version, own, parent, root, left
):
    group, names = machine / "cgroup", ("memory.max", "memory.current")
    text = "0::/user.slice/job 7\n"
    if version == 1:
        group, names = group / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        text = "5:cpu,cpuacct:/other\n4:memory:/user.slice/job 7\n0::/elsewhere\n"
    (machine / "own").write_text(text)
    limit(group / "user.slice" / "job 7", own, names=names)
    limit(group / "user.slice", parent, names=names)
    limit(group, root, names=names)
    limit(group / "other", 2, names=names)
    assert free(machine) == left * GIB


def test_a_path_outside_of_the_container_leaves_its_root(machine):
    (machine / "own").write_text("0::/../../kubepods/pod/container\n")
    limit(machine / "cgroup", 8)
    assert free(machine) == 7 * GIB


def test_a_system_without_these_files_has_no_known_memory(tmp_path):
    assert free(tmp_path) == 0
