"""Run a command that can read and write only what it is given, without the network, on Linux: the students' kernel.

    confine.py --read /usr --read .venv --write scratch -- python -m ipykernel_launcher -f connection.json
    confine.py --check

What holds, and who holds it: the Linux kernel, not Python.

    Landlock (Linux 6.2 or newer)     files are opened, made, changed and removed only below --read and --write
    a seccomp filter                  no socket but a local one, and none connects; no chown, no ptrace; chmod and utime
                                      say yes and do nothing, for shutil.copy cannot do without
    no_new_privs, no capabilities     no set-user-ID program helps, and root is nobody in particular
    resource limits                   the size of a file, the memory of a process

Signals reach only what the command itself has started; before Linux 6.12, whose Landlock sees to that, only itself.
All this is inherited by every child and cannot be taken off. What it does not stop, INSTRUCTOR.md says. Nothing of it
needs root. https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import platform
import resource
import stat
import struct
import sys
from pathlib import Path

OLDEST_ABI = 3  # before Linux 6.2 a confined program could still truncate every file
ABI_OF_TCP, ABI_OF_DEVICES, ABI_OF_SIGNALS = 4, 5, 6

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = (1 << bit for bit in range(4))
IOCTL_DEVICE = 1 << 15
MAKE_DEVICES = 1 << 6 | 1 << 11
FILES_ONLY = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | IOCTL_DEVICE

# System calls that change what belongs to the same user and that Landlock does not see, or that reach other processes.
ANYWHERE = {"io_uring_setup": 425, "setxattrat": 463, "removexattrat": 466, "file_setattr": 469}
MACHINES = {
    "x86_64": {
        "audit": 0xC000003E,
        "socket": 41,
        "prlimit64": 302,
        "signals": dict(kill=62, tgkill=234),
        "other_signals": dict(tkill=200, rt_sigqueueinfo=129, rt_tgsigqueueinfo=297, pidfd_send_signal=424),
        "refused": dict(
            connect=42, chown=92, fchown=93, lchown=94, fchownat=260, ptrace=101, setxattr=188, lsetxattr=189,
            fsetxattr=190, removexattr=197, lremovexattr=198, fremovexattr=199, **ANYWHERE,
        ),
        "ignored": dict(
            chmod=90, fchmod=91, fchmodat=268, fchmodat2=452, utime=132, utimes=235, futimesat=261, utimensat=280
        ),
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "socket": 198,
        "prlimit64": 261,
        "signals": dict(kill=129, tgkill=131),
        "other_signals": dict(tkill=130, rt_sigqueueinfo=138, rt_tgsigqueueinfo=240, pidfd_send_signal=424),
        "refused": dict(
            connect=203, fchownat=54, fchown=55, ptrace=117, setxattr=5, lsetxattr=6, fsetxattr=7, removexattr=14,
            lremovexattr=15, fremovexattr=16, **ANYWHERE,
        ),
        "ignored": dict(fchmod=52, fchmodat=53, fchmodat2=452, utimensat=88),
    },
}  # fmt: skip


class CannotConfine(Exception):
    """This machine lacks what confinement needs; the message says what."""


def system_call(name: str, number: int, *arguments) -> int:
    result = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def process_control(*arguments: int) -> None:
    longs = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:5]]
    if ctypes.CDLL(None, use_errno=True).prctl(*longs) < 0:
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}: {os.strerror(ctypes.get_errno())}")


def landlock_abi() -> int:
    """The version of Landlock this kernel speaks; CannotConfine where it is too old, or none."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise CannotConfine(f"{platform.system()} on {platform.machine()} is not Linux on {' or '.join(MACHINES)}")
    try:
        abi = system_call("landlock_create_ruleset", 444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError as error:
        raise CannotConfine(f"this kernel ({platform.release()}) has no Landlock, or has it switched off") from error
    if abi < OLDEST_ABI:
        raise CannotConfine(f"this kernel's Landlock is version {abi}; {OLDEST_ABI} or newer is needed (Linux 6.2)")
    return abi


def confine_files(abi: int, read: list[Path], write: list[Path]) -> None:
    everything = (1 << (15 if abi < ABI_OF_DEVICES else 16)) - 1
    fields = [everything]
    if abi >= ABI_OF_TCP:
        fields.append(0b11)  # bind and connect
    if abi >= ABI_OF_SIGNALS:
        fields.append(0b11)  # abstract sockets and signals stay inside
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    size = ctypes.c_size_t(len(attributes))
    rules = system_call("landlock_create_ruleset", 444, attributes, size, ctypes.c_uint32(0))
    for paths, rights in ((read, EXECUTE | READ_FILE | READ_DIR), (write, everything & ~EXECUTE & ~MAKE_DEVICES)):
        for path in paths:
            if not path.exists():
                continue
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not stat.S_ISDIR(os.fstat(place).st_mode):
                rights_here = rights & FILES_ONLY
            else:
                rights_here = rights
            rule = struct.pack("=Qi", rights_here, place)
            system_call("landlock_add_rule", 445, rules, ctypes.c_int(1), rule, ctypes.c_uint32(0))
            os.close(place)
    system_call("landlock_restrict_self", 446, rules, ctypes.c_uint32(0))
    os.close(rules)


def filter_system_calls(abi: int) -> None:
    """A seccomp filter: what is refused fails with EPERM, what is ignored returns 0."""
    machine = MACHINES[platform.machine()]
    refused, only = machine["refused"], [(machine["socket"], (1, 16)), (machine["prlimit64"], (0, 0))]
    if abi < ABI_OF_SIGNALS:
        refused = refused | machine["other_signals"]
        only += [(number, (os.getpid(), os.getpid())) for number in machine["signals"].values()]
    LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
    ALLOW, REFUSE, IGNORE = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000
    NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
    # (code, to skip if true, to skip if false, value); each check that holds falls on a RETURN.
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, machine["audit"]), (RETURN, 0, 0, REFUSE)]
    program += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, REFUSE)]  # x32's numbers
    for numbers, answer in ((refused, REFUSE), (machine["ignored"], IGNORE)):
        for number in numbers.values():
            program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, answer)]
    # Local sockets only (AF_UNIX; AF_NETLINK, by which ZeroMQ asks for the interfaces there are), no one else's limits.
    for number, allowed in only:
        program += [(EQUAL, 0, 5, number), (LOAD, 0, 0, FIRST_ARGUMENT)]
        program += [(EQUAL, 1, 0, allowed[0]), (EQUAL, 0, 1, allowed[1])]
        program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    program.append((RETURN, 0, 0, ALLOW))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    held = ctypes.create_string_buffer(code)
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(held)))
    process_control(22, 2, ctypes.addressof(header))  # PR_SET_SECCOMP, a filter


def give_up_privileges() -> None:
    process_control(38, 1)  # PR_SET_NO_NEW_PRIVS
    for capability in range(64):
        try:
            process_control(24, capability)  # PR_CAPBSET_DROP
        except OSError as error:
            if error.errno == errno.EPERM and os.geteuid() == 0:
                raise CannotConfine("this account is root and cannot give up root's capabilities") from error
            break  # no such capability, or not root, who has none


def limit(what: int, value: int) -> None:
    _, highest = resource.getrlimit(what)
    value = value if highest == resource.RLIM_INFINITY else min(value, highest)
    resource.setrlimit(what, (value, value))


def confine(read: list[Path], write: list[Path], *, memory: int, file_size: int) -> None:
    """Confine this process, for good. CannotConfine where it cannot be, or where it turns out not to be."""
    abi = landlock_abi()
    outside = os.path.realpath(__file__)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, file_size)
    limit(resource.RLIMIT_DATA, memory)
    give_up_privileges()
    confine_files(abi, read, write)
    filter_system_calls(abi)
    # A kernel that says yes to all this and confines nothing would not be noticed otherwise.
    for what, attempt in (("read", lambda: os.open(outside, os.O_RDONLY)), ("own", lambda: os.chown(outside, -1, -1))):
        try:
            attempt()
        except PermissionError:
            continue
        raise CannotConfine(f"this kernel says it is confined, but can still {what} {outside}")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say whether this machine can confine, and end")
    parser.add_argument("--read", action="append", default=[], type=Path, help="may be read and run")
    parser.add_argument("--write", action="append", default=[], type=Path, help="may be read and written, not run")
    parser.add_argument("--memory", type=int, default=8 << 30, help="bytes a process may allocate")
    parser.add_argument("--file-size", type=int, default=256 << 20, help="bytes a file may have")
    options = parser.parse_args(sys.argv[1:split])
    command = sys.argv[split + 1 :]
    try:
        if options.check:
            abi = landlock_abi()
            confine([], [], memory=options.memory, file_size=options.file_size)
            print(f"Landlock {abi}")
            return
        if not command:
            parser.error("expected a command after --")
        confine(options.read, options.write, memory=options.memory, file_size=options.file_size)
    except (CannotConfine, OSError) as error:
        sys.exit(f"confine.py: {error}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
