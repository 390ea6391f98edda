"""qmp - a monitor of QEMU, or of the helper that serves it in QEMU's place."""
import json, select, socket, time

TIMEOUT = 600  # seconds without an event, after which a migration counts as stuck


class Failed(Exception):
    """What was to be measured did not come about."""


class Qmp:
    def __init__(self, path):
        self.socket = connect(path)
        self.file = self.socket.makefile("rwb", buffering=0)
        self.socket.settimeout(TIMEOUT)
        self.events = []
        self.next()
        self.run("qmp_capabilities")
        # A QEMU that is just starting may greet twice, and begins anew then.
        try:
            self.run("query-version")
        except Failed:
            self.run("qmp_capabilities")

    def next(self):
        try:
            line = self.file.readline()
        except TimeoutError:
            raise Failed(f"Nothing from QEMU in {TIMEOUT} s") from None
        except OSError as error:
            raise Failed(f"QEMU's monitor is gone: {error}") from None
        if not line:
            raise Failed("QEMU has closed its monitor")
        return json.loads(line)

    def run(self, name, **arguments):
        self.file.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while True:
            message = self.next()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise Failed(f"{name}: {message['error']['desc']}")
            elif "return" in message:
                return message["return"]

    def hmp(self, line):
        return self.run("human-monitor-command", **{"command-line": line})

    def time_of(self, name, **data):
        """When an event came that has these data, in seconds since 1970; None: not yet."""
        for event in self.events:
            if event["event"] == name and data.items() <= event.get("data", {}).items():
                return event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        return None

    def await_event(self, name, meanwhile=None, period=0.1, **data):
        """As `time_of`, but waits for it; `meanwhile` is called with each event, and between them every
        `period` seconds."""
        while (found := self.time_of(name, **data)) is None:
            while meanwhile:
                meanwhile()
                if select.select([self.socket], [], [], period)[0]:
                    break
            message = self.next()
            if "event" in message:
                self.events.append(message)
                if message.get("data", {}).get("status") in ("failed", "cancelled"):
                    raise Failed(f"The migration has {self.run('query-migrate')}")
        return found


def connect(path):
    deadline = time.monotonic() + 30
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(path))
            return client
        except OSError:
            client.close()
            if time.monotonic() > deadline:
                raise Failed(f"Nobody serves {path}") from None
            time.sleep(0.02)
