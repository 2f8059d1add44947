"""Confinement of the process that runs a program: limits, system calls, files.

Runs in the program's process, before the program. Imports the standard library alone and is run by
path, so it may import nothing of this project.

A seccomp filter lets no further process start and no connection open, inside of bubblewrap and
without it. Where there is no bubblewrap, Landlock hides the files outside of the program's folder.
"""

import ctypes
import errno
import os
import platform
import resource
import struct

# Numbers of system calls by machine: those that start processes, open connections, reach other
# processes, or change what root could change.
_DENIED = {
    "x86_64": {
        "kill": 62, "tkill": 200, "rt_sigqueueinfo": 129, "pidfd_open": 434, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311, "fork": 57, "vfork": 58, "execve": 59,
        "execveat": 322, "socket": 41, "connect": 42, "bind": 49, "io_uring_setup": 425,
        "mount": 165, "umount2": 166, "unshare": 272, "setns": 308, "chroot": 161,
        "pivot_root": 155, "setrlimit": 160, "bpf": 321, "perf_event_open": 298, "keyctl": 250,
        "init_module": 175, "finit_module": 313, "reboot": 169, "swapon": 167, "settimeofday": 164,
        "clock_settime": 227, "sched_setaffinity": 203, "setpriority": 141, "mknod": 133,
        "mknodat": 259,
    },
    "aarch64": {
        "kill": 129, "tkill": 130, "rt_sigqueueinfo": 138, "pidfd_open": 434, "ptrace": 117,
        "process_vm_readv": 270, "process_vm_writev": 271, "execve": 221, "execveat": 281,
        "socket": 198, "connect": 203, "bind": 200, "io_uring_setup": 425, "mount": 40,
        "umount2": 39, "unshare": 97, "setns": 268, "chroot": 51, "pivot_root": 41,
        "setrlimit": 164, "bpf": 280, "perf_event_open": 241, "keyctl": 219, "init_module": 105,
        "finit_module": 273, "reboot": 142, "swapon": 224, "settimeofday": 170,
        "clock_settime": 112, "sched_setaffinity": 122, "setpriority": 140, "mknodat": 33,
    },
}  # fmt: skip
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_CLONE = {"x86_64": 56, "aarch64": 220}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_CLONE3 = 435
_CLONE_THREAD = 0x10000

_LOAD, _EQUAL, _SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: load word, jump, jump if set, return
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_*
_NUMBER, _MACHINE, _FIRST, _THIRD = 0, 4, 16, 32  # offsets in struct seccomp_data

_NO_NEW_PRIVILEGES, _SECCOMP, _DEATH_SIGNAL = 38, 22, 1  # prctl
_LANDLOCK = {"create": 444, "add": 445, "restrict": 446}
_EVERY_ACCESS = (1 << 13) - 1  # to files, as of Landlock's first version
_OF_FILES = 0b0111  # execute, write, read
_READ = 0b1101  # execute, read, list a folder


def set_limits(seconds: int, memory_bytes: int, file_bytes: int) -> None:
    """Bound CPU seconds, address space, the size of files, open files and core dumps."""
    for which, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (value, value))


def forbid_calls() -> None:
    """Let no process start, no connection open and no other process be reached, from now on.

    Raises:
        OSError: If the machine or the kernel has no such filter.
    """
    machine = platform.machine()
    if machine not in _DENIED:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {machine}")
    code = _filter(machine)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    program = Program(len(code) // 8, code)
    _prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _prctl(_SECCOMP, 2, ctypes.byref(program), 0, 0)


def hide_files(writable: list[str], readable: list[str]) -> None:
    """Let the process write at and below `writable` alone, and read there and at `readable`.

    Raises:
        OSError: If the kernel has no Landlock.
    """
    attribute = struct.pack("Q", _EVERY_ACCESS)
    rules = _call(_LANDLOCK["create"], attribute, len(attribute), 0)
    wanted = dict.fromkeys(readable, _READ) | dict.fromkeys(writable, _EVERY_ACCESS)
    for path, access in wanted.items():
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            granted = access if os.path.isdir(path) else access & _OF_FILES
            _call(_LANDLOCK["add"], rules, 1, struct.pack("=Qi", granted, place), 0)
            os.close(place)
    _prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call(_LANDLOCK["restrict"], rules, 0)
    os.close(rules)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    _prctl(_DEATH_SIGNAL, 9, 0, 0, 0)


def _filter(machine: str) -> bytes:
    """Return a BPF program that fails denied calls with EPERM, and `clone3` with ENOSYS."""
    denied = _FAIL | errno.EPERM
    code = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        # Without clone3 the C library starts threads by clone, whose flags can be read here.
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
        (_EQUAL, 0, 4, _CLONE[machine]),
        (_LOAD, 0, 0, _FIRST),
        (_SET, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, denied),
        (_EQUAL, 0, 6, _PRLIMIT[machine]),
        (_LOAD, 0, 0, _THIRD),  # the new limit's address, in two words: 0 only reads
        (_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _THIRD + 4),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, denied),
    ]
    for number in _DENIED[machine].values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, denied)]
    if machine == "x86_64":  # calls of the x32 interface have other numbers
        code += [(0x35, 0, 1, 0x40000000), (_RETURN, 0, 0, denied)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in code)


def _prctl(*args: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*args):
        raise OSError(ctypes.get_errno(), "prctl")


def _call(*args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock")
    return result
