"""Run a command that can read and write only what it is given, without the network, on Linux: the students' kernel.

    confine.py --read /usr --read .venv --write scratch -- python -m ipykernel_launcher -f connection.json
    confine.py --check

Bubblewrap does this where it is installed and may use namespaces: other files, processes and networks do not exist for
the command. Elsewhere the Linux kernel confines it from inside, from Linux 6.12 on, with nothing installed:

    Landlock                          files are opened, made, changed and removed only below --read and --write;
                                      signals, TCP and abstract sockets stay inside
    a seccomp filter                  only local sockets, and none connects; no chown; chmod and utime succeed and do
                                      nothing, because shutil.copy needs them
    no_new_privs, no capabilities     set-user-ID programs do not help, and root has no power

Both limit the size of a file and the memory of a process, hold for every child, and need no root. INSTRUCTOR.md says
what they do not stop. https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import platform
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

NEEDED_ABI = 6  # Linux 6.12, whose Landlock confines signals, too
EXECUTE, READ_FILE, READ_DIR = 1, 1 << 2, 1 << 3
EVERYTHING, MAKE_DEVICES = (1 << 16) - 1, 1 << 6 | 1 << 11
FILES_ONLY = 0b111 | 1 << 14 | 1 << 15
# System calls by machine. Refused are those that Landlock does not see: they change or reach what belongs to the user.
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SOCKET = {"x86_64": 41, "aarch64": 198}
EVERYWHERE = {425, 463, 466, 469}  # io_uring_setup, setxattrat, removexattrat, file_setattr
REFUSED = {
    # connect, chown (4), ptrace, setxattr (3), removexattr (3), prlimit64
    "x86_64": {42, 92, 93, 94, 260, 101, 188, 189, 190, 197, 198, 199, 302} | EVERYWHERE,
    "aarch64": {203, 54, 55, 117, 5, 6, 7, 14, 15, 16, 261} | EVERYWHERE,
}
IGNORED = {  # chmod and utime
    "x86_64": {90, 91, 268, 452, 132, 235, 261, 280},
    "aarch64": {52, 53, 452, 88},
}


class CannotConfine(Exception):
    """This machine lacks what confinement needs; the message says what."""


def bubblewrap(read: list[Path], write: list[Path]) -> list[str] | None:
    """The command that runs another one in its own namespaces; None where bubblewrap is missing or does not work."""
    program = shutil.which("bwrap")
    if program is None or os.environ.get("LAB_BUBBLEWRAP") == "0":
        return None
    command = [program, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    # A kernel that knows its parent ends when that is process 1, as bubblewrap is in its namespace.
    command += ["--unsetenv", "JPY_PARENT_PID", "--proc", "/proc", "--dev", "/dev"]
    for kind, paths in (("--ro-bind-try", read), ("--bind-try", write)):
        for path in (os.path.abspath(path) for path in paths):
            if not path.startswith(("/proc", "/dev/")):
                command += [kind, path, path]
    command += ["--remount-ro", "/", "--"]
    works = subprocess.run([*command, "/usr/bin/env", "true"], capture_output=True)
    return None if works.returncode else command


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
    """The version of this kernel's Landlock; CannotConfine where it is too old or missing."""
    if sys.platform != "linux" or platform.machine() not in AUDIT:
        raise CannotConfine(f"{platform.system()} on {platform.machine()} is not Linux on {' or '.join(AUDIT)}")
    try:
        abi = system_call("landlock_create_ruleset", 444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError as error:
        raise CannotConfine(
            f"bubblewrap does not run, and this kernel ({platform.release()}) has no Landlock"
        ) from error
    if abi < NEEDED_ABI:
        raise CannotConfine(f"bubblewrap does not run, and the kernel's Landlock is version {abi}, not {NEEDED_ABI}")
    return abi


def confine_files(read: list[Path], write: list[Path]) -> None:
    # All kinds of access to files; bind and connect by TCP; abstract sockets and signals.
    attributes = struct.pack("=3Q", EVERYTHING, 0b11, 0b11)
    size = ctypes.c_size_t(len(attributes))
    rules = system_call("landlock_create_ruleset", 444, attributes, size, ctypes.c_uint32(0))
    for paths, rights in ((read, EXECUTE | READ_FILE | READ_DIR), (write, EVERYTHING & ~EXECUTE & ~MAKE_DEVICES)):
        for path in filter(Path.exists, paths):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights if path.is_dir() else rights & FILES_ONLY, place)
            system_call("landlock_add_rule", 445, rules, ctypes.c_int(1), rule, ctypes.c_uint32(0))
            os.close(place)
    system_call("landlock_restrict_self", 446, rules, ctypes.c_uint32(0))
    os.close(rules)


def filter_system_calls() -> None:
    """A seccomp filter: what is refused fails with EPERM, what is ignored returns 0."""
    machine = platform.machine()
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    allow, ignore = 0x7FFF0000, 0x00050000
    refuse = ignore | errno.EPERM
    # (code, to skip if true, to skip if false, value): number at offset 0, machine at 4, first argument at 16.
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT[machine]), (end, 0, 0, refuse)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # numbers of x32
    for numbers, answer in ((REFUSED[machine], refuse), (IGNORED[machine], ignore)):
        for number in numbers:
            program += [(equal, 0, 1, number), (end, 0, 0, answer)]
    # Local sockets only: AF_UNIX, and AF_NETLINK, by which ZeroMQ asks for the interfaces there are.
    program += [(equal, 0, 3, SOCKET[machine]), (load, 0, 0, 16), (equal, 1, 0, 1), (equal, 0, 1, 16)]
    program += [(end, 0, 0, allow), (end, 0, 0, refuse)]
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


def confine(read: list[Path], write: list[Path]) -> None:
    """Confine this process, for good. CannotConfine where it cannot be, or where it turns out not to be."""
    outside = os.path.realpath(__file__)
    give_up_privileges()
    confine_files(read, write)
    filter_system_calls()
    # A kernel that reports success and confines nothing would not be noticed otherwise.
    for what, attempt in (("read", lambda: os.open(outside, os.O_RDONLY)), ("own", lambda: os.chown(outside, -1, -1))):
        try:
            attempt()
        except PermissionError:
            continue
        raise CannotConfine(f"this kernel reports that the process is confined, but it can still {what} {outside}")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say how this machine confines, and end")
    parser.add_argument("--read", action="append", default=[], type=Path, help="may be read and run")
    parser.add_argument("--write", action="append", default=[], type=Path, help="may be read and written")
    parser.add_argument("--memory", type=int, default=8 << 30, help="bytes a process may allocate")
    parser.add_argument("--file-size", type=int, default=256 << 20, help="bytes a file may have")
    options = parser.parse_args(sys.argv[1:split])
    command = sys.argv[split + 1 :]
    if not (options.check or command):
        parser.error("expected a command after --")
    system = [Path(path) for path in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")]
    try:
        inside = bubblewrap([*system, *options.read], options.write)
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_FSIZE, options.file_size)
        limit(resource.RLIMIT_DATA, options.memory)
        if inside is None:
            abi = landlock_abi()
            confine(options.read, options.write)
        if options.check:
            print("bubblewrap" if inside else f"Landlock {abi} (bubblewrap, where installed, hides more)")
            return
    except (CannotConfine, OSError) as error:
        sys.exit(f"confine.py: {error}")
    os.execv((inside or command)[0], [*(inside or []), *command])


if __name__ == "__main__":
    main()
