"""A zygote that sends any bytes: a program in place of ours, for `test_fuzz_protocol.py`.

Started as the zygote, it sends a valid greeting, then answers every request with the bytes of the
request's program: a test calls `Sandbox.run(answer)` to say what it must send. If the answer begins
with DIE, it exits; if with SILENT, it sends nothing.
"""

from __future__ import annotations

GREETING = """\
{"namespaces": [], "files": ["landlock_abi_1"], "unprivileged_user": true, "no_new_privs": true,
 "rlimits": true, "seccomp": true, "threads": true, "launcher": "native"}"""

SCRIPT = """\
import array, os, select, socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
greeting = GREETING_BYTES
control.send(greeting)
def receive(channel):
    message, ancillary, _, _ = channel.recvmsg(1 << 16, socket.CMSG_SPACE(32))
    descriptors = array.array('i')
    for _, _, data in ancillary: descriptors.frombytes(data)
    return message, list(descriptors) or [None]
poller = select.poll(); poller.register(control, select.POLLIN)
sessions = {}
while True:
    for descriptor, _ in poller.poll():
        if descriptor == control.fileno():
            message, (number, *files) = receive(control)
            if not message: os._exit(0)
            session, answer = socket.socket(fileno=number), os.pread(files[-1], 1 << 16, 0)
            sessions[session.fileno()] = session, answer
            poller.register(session, select.POLLIN)
        else:
            session, answer = sessions[descriptor]
            try: message, files = receive(session)
            except OSError: message = b''
            if not message:
                poller.unregister(session); del sessions[descriptor]; session.close()
                continue
        for file in files: file is None or os.close(file)
        if answer.startswith(b'DIE'): os._exit(1)
        if answer.startswith(b'SILENT'): continue
        try: session.send(answer)
        except OSError: pass
"""


def command(greeting: bytes = GREETING.encode()) -> str:
    """Return the Python text to start in place of a zygote's."""
    return SCRIPT.replace("GREETING_BYTES", repr(greeting))
