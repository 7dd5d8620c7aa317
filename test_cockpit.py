# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp", "pytest", "pytest-aiohttp"]
# ///
"""The specification of `cockpit.py`, as tests, in the order of its sections.

Nothing of cockpit is replaced: `FakeFly`, `FakeTwilio` and `FakeVMs` are small servers on loopback, strict like the originals, which
remember what they were asked and fail on command; `FakeClock` is the time cockpit is given, so that hours pass in milliseconds.
`World` puts them around one gateway; `Child` is the same gateway as a real process, for promises about exits, signals and kills. To be quick, a `Zygote` forks
these processes, they run `Beside` the other tests, and those are run by a `Pair` of processes where there are two cores.

Sections: the fakes (clock and wires, Fly, VMs, Twilio, world), then the file's own: settings, records and keys, time, routes on disk,
messages on disk, Fly, Twilio, provisioning, relay (running, sending, conversations), answers (what a VM says, what Twilio does with it), whose phone
it is (with stamps), fleet (with doctor and the owner's commands), sleep, HTTP, doors, page (with metrics and logs), local world (with agents), assembly;
last, what must hold whatever happens: never lose a text, never leave half a VM.
"""
import ast
import asyncio
import base64
import contextlib
import errno
import gc
import hashlib
import heapq
import hmac
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import os
import py_compile
import queue
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zlib
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode
from xml.etree import ElementTree

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

import cockpit

HERE = Path(__file__).resolve().parent
KEY, SECRET = "onboarding-page-key-0123456789", "root-of-tokens-and-marks-0123456789abcdef"
FLY_TOKEN, AUTH_TOKEN, ACCOUNT = "FlyV1 fm2_organisation,fm2_discharge", "twilio-auth-token-of-the-account", "AC" + "a" * 32
PUBLIC, NUMBER, ORG = "https://cockpit.example.com", "+15550000000", "acme"
ANN, BOB, EVE = "+15551234567", "+15557654321", "+15559990000"
PHONES = [f"+15551110{n:03d}" for n in range(30)]
GITHUB, ANTHROPIC = "ghp_the-github-token-of-ann", "sk-ant-the-api-key-of-ann"
SECRETS = (KEY, SECRET, "fm2_organisation", AUTH_TOKEN, GITHUB, ANTHROPIC)
RESTARTING = "Your VM is restarting... Your text is kept and will run when it is back."
FILES = 256  # open at once: a gateway, its fakes and a few children


def make_room_for_files() -> None:
    """Children are given what this process has, so a low limit is raised where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, max(FILES, hard)))
        except (ValueError, OSError):
            pytest.exit(f"these tests need {FILES} open files and may have {hard}: ulimit -n {FILES}", 4)


make_room_for_files()


# --- Clock and wires ---

FORKING = threading.Lock()


class Popen(subprocess.Popen):
    """Until it runs its program a new process has copies of all our files, locks and connections: what is closed meanwhile stays open for everybody else."""

    def __init__(self, *given: Any, **more: Any):
        with FORKING:
            super().__init__(*given, **more)


class Selector(selectors.DefaultSelector):
    """What every loop here waits with: asked to, it tells when the loop has nothing left to do, no thread works for it and no byte is under way to it."""

    asked = threading.local()  # by the loop of this thread: what to tell, and whether a thread is at work
    ends: list[socket.socket] = []

    def select(self, timeout: float | None = None) -> list:
        told, is_writing = getattr(self.asked, "now", None) or (None, None)
        if told is None or told.done() or timeout is not None and timeout <= 0:
            return super().select(timeout)
        if is_writing():
            return super().select(0.001 if timeout is None else min(timeout, 0.001))
        self._overtake_nothing()
        found = super().select(0)
        found or told.set_result(None)
        return found

    def _overtake_nothing(self) -> None:
        """A byte through loopback arrives behind all that was sent, connected and closed before it."""
        if not self.ends:
            with socket.create_server(("127.0.0.1", 0)) as server:
                self.ends += socket.create_connection(server.getsockname()), server.accept()[0]
            self.ends[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ends[0].send(b".")
        self.ends[1].recv(1)


selectors.DefaultSelector = Selector


class FakeClock:
    """Virtual time. It moves only inside `advance`, `until` and `run`, sleeper by sleeper, once nothing else moves.

    `live` is real time, for tests with a real process. Chance is `pick`; by default the longest pause that may be drawn.
    """

    def __init__(self, *, live: bool = False):
        self.live, self.elapsed, self.moves = live, 0.0, 0
        self.set_by = 0.0  # somebody set the wall clock
        self.slept: list[float] = []
        self.drawn: list[tuple[float, float]] = []
        self._sleepers: list = []
        self._order = itertools.count()
        self.pick: Callable[[float, float], float] = lambda low, high: high
        self.is_writing: Callable[[], bool] = lambda: False

    @property
    def clock(self) -> cockpit.Clock:
        return cockpit.Clock(wall=self.now, monotonic=self.monotonic, sleep=self.sleep, time_limit=self.time_limit, uniform=self.uniform)

    @contextlib.asynccontextmanager
    async def time_limit(self, seconds: float):
        """Like asyncio.timeout, in virtual time."""
        async with asyncio.timeout(seconds if self.live else None) as limit:
            async def expire() -> None:
                await self._wait(seconds)
                limit.reschedule(asyncio.get_running_loop().time())
            watchdog = None if self.live else asyncio.create_task(expire())
            try:
                yield
            finally:
                watchdog and watchdog.cancel()

    def now(self) -> float:
        return time.time() if self.live else 1_795_377_600.25 + self.elapsed + self.set_by  # 2026-11-22T20:00:00.25Z

    def monotonic(self) -> float:
        return time.monotonic() if self.live else 1000 + self.elapsed

    async def sleep(self, seconds: float) -> None:
        if self.live:
            return await asyncio.sleep(seconds)
        self.slept.append(seconds)
        await self._wait(seconds)

    async def _wait(self, seconds: float) -> None:
        self.touch()
        awake = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.elapsed + max(0.0, seconds), next(self._order), awake))
        await awake

    def uniform(self, low: float, high: float) -> float:
        self.drawn.append((low, high))
        return self.pick(low, high)

    def touch(self) -> None:
        """Something happened: virtual time stands still for another moment."""
        self.moves += 1

    async def settle(self) -> None:
        """Returns when nothing moves any more: whatever is to go on waits for this clock, for real time or for the test."""
        told = asyncio.get_running_loop().create_future()
        Selector.asked.now = told, lambda: self.is_writing() or FORKING.locked()
        await told

    async def _wake_next(self, end: float, unless: Callable[[], Any] = bool) -> bool:
        """Wakes the next sleeper if it is due by then."""
        await self.settle()
        if self._next() > end or unless():
            return False
        at, _, awake = heapq.heappop(self._sleepers)
        self.elapsed = max(self.elapsed, at)
        awake.set_result(None)
        return True

    def _next(self) -> float:
        while self._sleepers and self._sleepers[0][2].done():
            heapq.heappop(self._sleepers)
        return self._sleepers[0][0] if self._sleepers else float("inf")

    async def advance(self, seconds: float) -> None:
        end = self.elapsed + seconds
        while await self._wake_next(end):
            pass
        self.elapsed = end
        await self.settle()

    async def until(self, condition: Callable[[], Any], within: float = 120, real: float = 8) -> Any:
        """Lets time run until the condition holds, for at most `within` virtual (and `real` real) seconds."""
        end, deadline = self.elapsed + within, time.monotonic() + real
        while not (found := condition()):
            assert time.monotonic() < deadline, f"never came true in {self.elapsed - end + within:.0f} virtual seconds"
            before = self.moves
            await asyncio.sleep(0.005 if self.live else 0)
            if self.moves == before and not condition() and not self.live:
                await self._wake_next(end, condition)
        return found

    async def run(self, work) -> Any:
        """Awaits `work` while letting time run."""
        task = asyncio.ensure_future(work)
        try:
            await self.until(task.done, 1000, 15)
            return task.result()
        finally:
            task.cancel()


PORTS = itertools.count(random.SystemRandom().randrange(15_000), 2)  # those between are for the other process of a `Pair`


def free_port() -> int:
    """A port nobody listens on and nobody else is given, below those that the kernel gives to outgoing connections: it is listened on only a while later."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as attempt:
            attempt.bind(("127.0.0.1", 15_000 + next(PORTS) % 17_000))
            return attempt.getsockname()[1]


class Server:
    """An app on loopback, served as in production: a handler goes on when its caller hangs up (aiohttp's TestServer would cancel it)."""

    def __init__(self, app: web.Application, runner: web.AppRunner | None = None):
        self.port, self.url, self.listening = free_port(), "", False
        self.runner = runner or web.AppRunner(app, access_log=None, shutdown_timeout=0.02)

    async def start(self) -> "Server":
        while FORKING.locked():
            await asyncio.sleep(0.001)
        if self.runner.server is None:
            await self.runner.setup()
        try:
            await web.TCPSite(self.runner, "127.0.0.1", self.port).start()
        except OSError:
            if self.url:
                raise
            self.port = free_port()  # somebody was quicker, and nobody knows this one yet
            return await self.start()
        self.url, self.listening = f"http://127.0.0.1:{self.port}", True
        return self

    @property
    def connections(self) -> list[web.RequestHandler]:
        return web.AppRunner.server.fget(self.runner).connections

    async def refuse(self) -> None:
        """Nobody listens any more; connections kept open are cut."""
        for site in list(self.runner.sites):
            await site.stop()
        for connection in self.connections:
            connection.transport and connection.transport.abort()
        self.listening = False

    async def close(self) -> None:
        await self.runner.cleanup()


@dataclass
class Seen:
    """One request a fake received."""
    name: str
    path: str
    query: dict[str, str]
    body: Any
    headers: Any
    at: float


class Gate:
    """Holds requests back until it is opened, and tells when one has arrived."""

    def __init__(self):
        self.arrived, self.opened = asyncio.Event(), asyncio.Event()

    def open(self) -> None:
        self.opened.set()


@dataclass
class Fault:
    """What happens to the next requests of one name: before or after they took effect."""
    after: bool = False
    status: int = 0  # 0: the connection is cut
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    gate: Gate | None = None
    left: float = 1


class Fake:
    """A server on loopback that remembers its requests, objects to what the real one would refuse, and fails on command."""

    routes: tuple[tuple[str, str, str], ...] = ()  # method, path, name

    def __init__(self, clock: FakeClock):
        self.clock, self.seen, self.objections = clock, [], []
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._gates: list[Gate] = []
        self.deaf, self._life = False, 0
        self.peers: list[Any] = []  # who asked, one entry a request but for /health
        self.app = web.Application(middlewares=[self._wire], client_max_size=16 << 20)
        for method, path, name in self.routes:
            self.app.router.add_route(method, path, self._wire, name=name)
        self.server = Server(self.app)

    def fails(self, name: str, status: int, times: float = 1, body: Any = None, headers: dict[str, str] | None = None, after: bool = False) -> None:
        self._faults[name].append(Fault(after, status, {"error": f"{status} by script"} if body is None else body, headers or {}, None, times))

    def drops(self, name: str, *, after: bool = False, times: float = 1) -> None:
        self._faults[name].append(Fault(after, left=times))

    def answers_late(self, name: str, status: int = 504) -> None:
        self.fails(name, status, after=True)

    def holds(self, name: str, *, after: bool = False) -> Gate:
        gate = Gate()
        self._gates.append(gate)
        self._faults[name].append(Fault(after, gate=gate))
        return gate

    def heals(self, name: str) -> None:
        self._faults[name].clear()

    def opens_all(self) -> None:
        self._faults.clear()
        for gate in self._gates:
            gate.open()

    def forgets_its_callers(self) -> None:
        """Those who asked are gone: what is still held never takes effect."""
        self._life += 1
        for name, faults in self._faults.items():
            self._faults[name] = deque(fault for fault in faults if not fault.gate)
        for gate in self._gates:
            gate.open()

    def calls(self, name: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.name == name]

    def count(self, name: str) -> int:
        return len(self.calls(name))

    def refuse(self, why: str, status: int = 400, body: Any = None) -> web.Response:
        self.objections.append(why)
        return web.json_response({"error": f"invalid_argument: {why}"} if body is None else body, status=status)

    async def read(self, request: web.Request) -> Any:
        return await request.json() if request.can_read_body else None

    async def admit(self, request: web.Request, seen: Seen) -> web.Response | None:
        """An answer that refuses the request at the door, or None."""
        return None

    async def act(self, name: str, request: web.Request, body: Any) -> Any:
        """What the call does and answers: a response, a JSON value, or (status, JSON value)."""
        raise NotImplementedError

    async def _answer(self, request: web.Request, seen: Seen) -> web.Response:
        answer = await self.act(seen.name, request, seen.body)
        status, value = answer if isinstance(answer, tuple) else (200, answer)
        return answer if isinstance(answer, web.Response) else web.json_response(value, status=status)

    def _scripted(self, fault: Fault) -> web.Response:
        if hasattr(fault.body, "__aiter__"):  # in chunks
            return web.Response(body=fault.body, status=fault.status, headers=fault.headers)
        return web.json_response(fault.body, status=fault.status, headers=fault.headers)

    @web.middleware
    async def _wire(self, request, handler):
        self.clock.touch()
        life, name = self._life, request.match_info.route.name or "unknown"
        try:
            if self.deaf:
                return cut(request)
            seen = Seen(name, request.raw_path, dict(request.query), await self.read(request), request.headers, self.clock.monotonic())
            self.seen.append(seen)
            if name != "health" and request.transport is not None:
                self.peers.append(request.transport.get_extra_info("peername"))
            if name == "unknown":
                return self.refuse(f"no such call: {request.method} {request.path}", 404)
            if (refusal := await self.admit(request, seen)) is not None:
                return refusal
            faults = self._faults[name]
            fault = faults[0] if faults else None
            if fault:
                fault.left -= 1
                if fault.left <= 0:
                    faults.popleft()
            response = None
            if fault is None or fault.after:
                response = await self._answer(request, seen)
            if fault and fault.gate:
                fault.gate.arrived.set()
                await fault.gate.opened.wait()
                if life != self._life:
                    return cut(request)
                response = response or await self._answer(request, seen)
            elif fault:
                response = self._scripted(fault) if fault.status else cut(request)
            if self.deaf or response is None:
                return cut(request)
            if not self.clock.live:
                response.headers["Date"] = format_datetime(datetime.fromtimestamp(self.clock.now() + getattr(self, "skew", 0), UTC), usegmt=True)
            return response
        finally:
            self.clock.touch()


def cut(request: web.Request) -> web.Response:
    """Cuts the connection instead of answering."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def misfit(value: Any, shape: Any, at: str = "body") -> str:
    """Why a JSON value does not fit a shape: a type, {field: shape}, {str: shape} (a map), [shape] or a tuple (an enumeration)."""
    if isinstance(shape, tuple):
        return "" if value in shape else f"{at} is none of {shape}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} is no array"
        return next(filter(None, (misfit(item, shape[0], f"{at}[{n}]") for n, item in enumerate(value))), "")
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{at} is no object"
        inner = shape.get(str)
        return next(filter(None, (misfit(item, inner or shape[key], f"{at}.{key}") if inner or key in shape else f"{at}.{key} is unknown"
                                  for key, item in value.items())), "")
    return "" if isinstance(value, shape) and (shape is bool or not isinstance(value, bool)) else f"{at} is no {shape.__name__}"


# --- Fly ---

def fields(kind: type, names: str) -> dict[str, type]:
    return dict.fromkeys(names.split(), kind)


# The request bodies of the Machines API's OpenAPI document (info.version 1.0), field by field.
PERSIST, SIGNALS = ("never", "always", "restart"), ("SIGHUP", "SIGINT", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGTERM")
CHECK = fields(str, "grace_period interval method path protocol timeout tls_server_name type") | {
    "port": int, "tls_skip_verify": bool, "headers": [{"name": str, "values": [str]}]}
GUEST = fields(int, "cpus gpus max_memory_mb memory_mb") | fields(str, "cpu_kind gpu_kind host_dedication_id") | {
    "kernel_args": [str], "persist_rootfs": PERSIST}
EXEC = {"cmd": [str], "entrypoint": [str], "exec": [str]}
PORT = fields(int, "end_port port start_port") | {
    "force_https": bool, "handlers": [str], "proxy_proto_options": {"version": str},
    "tls_options": {"alpn": [str], "default_self_signed": bool, "versions": [str]},
    "http_options": fields(bool, "compress h2_backend") | fields(int, "headers_read_timeout idle_timeout") | {
        "response": {"headers": {str: object}, "pristine": bool}}}
SERVICE = fields(int, "internal_port min_machines_running") | fields(str, "force_instance_description force_instance_key protocol") | {
    "autostart": bool, "autostop": ("off", "stop", "suspend"), "checks": [CHECK], "ports": [PORT],
    "concurrency": {"hard_limit": int, "soft_limit": int, "type": str}}
MOUNT = fields(int, "add_size_gb extend_threshold_percent size_gb size_gb_limit") | fields(str, "name path volume") | {"encrypted": bool}
CONFIG = fields(bool, "auto_destroy disable_machine_autostart") | fields(str, "image schedule size") | {
    "checks": {str: CHECK | {"kind": ("informational", "readiness")}}, "env": {str: str}, "guest": GUEST, "metadata": {str: str}, "mounts": [MOUNT],
    "files": [fields(str, "guest_path image_config raw_value secret_name") | {"mode": int}], "metrics": {"https": bool, "path": str, "port": int},
    "init": EXEC | {"kernel_args": [str], "swap_size_mb": int, "tty": bool},
    "processes": [EXEC | {"env": {str: str}, "ignore_app_secrets": bool, "secrets": [fields(str, "env_var name")], "user": str}],
    "restart": {"gpu_bid_price": float, "max_retries": int, "policy": ("no", "always", "on-failure", "spot-price")},
    "rootfs": {"persist": PERSIST, "size_gb": int}, "services": [SERVICE], "standbys": [str], "stop_config": {"signal": SIGNALS, "timeout": str}}
MACHINE = fields(int, "lease_ttl min_secrets_version") | fields(str, "name region") | {"config": CONFIG} | fields(
    bool, "skip_launch skip_secrets skip_service_registration")
BODIES = {
    "create_app": fields(str, "name network org_slug") | {"enable_subdomains": bool},
    "set_secrets": {"values": {str: object}},  # a string sets, null unsets
    "allocate_ip": fields(str, "network org_slug region service_name type"), "create_machine": MACHINE,
    "update_machine": MACHINE | {"current_version": str}, "stop_machine": {"signal": SIGNALS, "timeout": str}, "set_metadata": fields(str, "value updated_at"),
    "create_volume": fields(bool, "auto_backup_enabled encrypted require_unique_zone unique_zone_app_wide") | fields(int, "size_gb snapshot_retention") |
    fields(str, "compute_image fstype name region snapshot_id source_volume_id") | {"compute": GUEST}}
MACHINES_QUERY = "include_deleted region state summary"
QUERIES = {  # those of the document, and the two the official client sends
    "create_app": "wait", "list_apps": "org_slug app_role", "delete_app": "force", "list_machines": MACHINES_QUERY + " include_leases",
    "get_machine": "include_leases", "delete_machine": "force", "list_volumes": "summary", "restart_machine": "timeout signal",
    "wait_machine": "version instance_id from_event_id timeout state", "org_machines": MACHINES_QUERY + " updated_after cursor limit"}


@dataclass
class App:
    name: str
    network: str
    seen_by_all_at: float
    ips: list = field(default_factory=list)
    secrets: dict = field(default_factory=dict)
    version: int = 0
    volumes: dict = field(default_factory=dict)
    machines: dict = field(default_factory=dict)
    polls_left: int | None = None  # of a deleted app, until it is gone


@dataclass
class Machine:
    id: str
    app: str
    name: str
    region: str
    config: dict
    instance_id: str
    rest: str = "created"  # its state, when it is not on its way to `started`
    freezes_at: float = 0.0  # when `suspending` ends
    started_at: float = 0.0
    host: str = "ok"
    created_at: str = "2026-11-22T20:00:00Z"
    pulled: bool = False  # its image is on its host


class FakeFly(Fake):
    """The Machines API, as strict as its document: unknown fields and parameters, rate limits, eventual consistency, slow deletes."""

    A, M = "/v1/apps/{app}", "/v1/apps/{app}/machines/{id}"
    routes = (
        ("POST", "/v1/apps", "create_app"), ("GET", "/v1/apps", "list_apps"), ("GET", A, "get_app"), ("DELETE", A, "delete_app"),
        ("POST", A + "/secrets", "set_secrets"), ("GET", A + "/ip_assignments", "list_ips"), ("POST", A + "/ip_assignments", "allocate_ip"),
        ("GET", A + "/volumes", "list_volumes"), ("POST", A + "/volumes", "create_volume"), ("DELETE", A + "/volumes/{volume}", "delete_volume"),
        ("GET", A + "/machines", "list_machines"), ("POST", A + "/machines", "create_machine"), ("GET", M, "get_machine"),
        ("POST", M, "update_machine"), ("DELETE", M, "delete_machine"), ("GET", M + "/wait", "wait_machine"), ("POST", M + "/start", "start_machine"),
        ("POST", M + "/stop", "stop_machine"), ("POST", M + "/suspend", "suspend_machine"), ("POST", M + "/restart", "restart_machine"), ("GET", M + "/metadata", "get_metadata"),
        ("POST", M + "/metadata/{key}", "set_metadata"), ("DELETE", M + "/metadata/{key}", "delete_metadata"),
        ("GET", "/v1/orgs/{org}/machines", "org_machines"), ("GET", "/v1/tokens/current", "current_tokens"), ("GET", "/v1/platform/regions", "regions"))

    def __init__(self, clock: FakeClock, vms: "FakeVMs"):
        super().__init__(clock)
        self.vms, self.everything = vms, {}
        self.rate_limited, self.hide_s, self.boot_s, self.pull_s, self.delete_polls = True, 2.0, 0.0, 0.0, 1
        self.freeze_s, self.resume_s = 0.0, 0.0
        self.networks, self.full, self.error_regions = {"default", "gateway-net"}, set(), []
        self.checks = ""  # what Fly's own health check says; empty: as the VM is
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}
        self._numbers = itertools.count(1)

    @property
    def apps(self) -> dict[str, App]:
        return {name: app for name, app in self.everything.items() if app.polls_left is None}

    @property
    def machines(self) -> list[Machine]:
        return [machine for app in self.apps.values() for machine in app.machines.values()]

    def plants(self, name: str, machines: int = 1, **metadata: str) -> App:
        """An app that this gateway did not make, with machines that carry this metadata."""
        app = self.everything[name] = App(name, name, 0.0)
        for _ in range(machines):
            id = f"{next(self._numbers):014x}"
            app.machines[id] = Machine(id, name, f"name-{id}", "iad", {"image": "vm-image:7", "metadata": metadata}, f"01H{id.upper()}")
        return app

    def rests(self, vm: "FakeVM", state: str) -> None:
        """Stops or suspends a VM's machine, as somebody at the console would."""
        for machine in self.apps[vm.app].machines.values():
            machine.rest = state

    async def admit(self, request, seen):
        if seen.headers.get("Authorization") != FLY_TOKEN:
            return self.refuse("unauthorized", 401, {"error": "unauthorized"})
        if odd := set(seen.query) - set(QUERIES.get(seen.name, "").split()):
            return self.refuse(f"{seen.name}: unknown parameters {odd}")
        if why := misfit(seen.body or {}, BODIES.get(seen.name, {})):
            return self.refuse(f"{seen.name}: {why}")
        name, id = request.match_info.get("app", ORG), request.match_info.get("id", "")
        if self.rate_limited and not self._allowed(seen.name, name + id):
            return web.Response(status=429, text="rate limit exceeded")
        if name != ORG:
            app = self.everything.get(name)
            if app is None or self.clock.monotonic() < app.seen_by_all_at and request.cookies.get("fly_flaps_affinity") != f"node-of-{name}":
                return web.json_response({"error": "app not found"}, status=404)
            if id and id not in app.machines:
                return web.json_response({"error": "machine not found"}, status=404)
        return None

    def _allowed(self, call: str, identifier: str) -> bool:
        rate, burst, now = *((5, 10) if call == "get_machine" else (1, 3)), self.clock.monotonic()
        tokens, at = self._buckets.get((call, identifier), (burst, now))
        tokens = min(burst, tokens + (now - at) * rate) + 1e-6
        self._buckets[call, identifier] = (tokens - (tokens >= 1), now)
        return tokens >= 1

    def state(self, machine: Machine) -> str:
        if machine.rest == "suspending" and self.clock.monotonic() >= machine.freezes_at:
            machine.rest = "suspended"
        return machine.rest or ("started" if self.clock.monotonic() >= machine.started_at else "starting")

    def _launch(self, machine: Machine, body: dict | None = None) -> None:
        machine.rest, machine.started_at = "", self.clock.monotonic() + self.boot_s + (0 if machine.pulled else self.pull_s)
        machine.pulled = True
        if body is not None:  # secrets younger than the version asked for are missing
            app = self.everything[machine.app]
            self.vms.boot(machine.app, lambda: self.state(machine) == "started", dict(app.secrets) if body.get("min_secrets_version", 0) >= app.version else {})

    def _capacity(self, regions: str) -> str:
        return next((region for region in regions.split(",") if region not in self.full), "")

    def _app(self, app: App) -> dict:
        return {"id": "x" + app.name, "name": app.name, "status": "deployed", "network": app.network, "organization": {"name": "Acme", "slug": ORG},
                "machine_count": len(app.machines), "volume_count": len(app.volumes)}

    def _machine(self, machine: Machine) -> dict:
        status = self.checks or ("passing" if self.vms[machine.app].is_up() else "critical") if machine.app in self.vms.all else ""
        return {"id": machine.id, "name": machine.name, "state": self.state(machine), "region": machine.region, "instance_id": machine.instance_id,
                "private_ip": "fdaa::99", "created_at": machine.created_at, "updated_at": "2026-11-22T20:00:00Z", "config": machine.config,
                "host_status": machine.host, "cordoned": False, "events": [], "image_ref": {"repository": machine.config["image"], "digest": "sha256:0"},
                "checks": [{"name": name, "status": status, "output": "", "updated_at": ""} for name in machine.config.get("checks", {}) if status]}

    async def act(self, name, request, body):
        app = self.everything.get(request.match_info.get("app"))
        if "id" in request.match_info:
            return await self._act_on_machine(name, request, body, app, app.machines[request.match_info["id"]])
        match name:
            case "create_app":
                return self._create_app(body["name"], body.get("network", "default"), body.get("org_slug"))
            case "list_apps":
                return {"total_apps": len(self.everything), "apps": [self._app(app) for app in self.everything.values() if request.query["org_slug"] == ORG]}
            case "get_app":
                if app.polls_left is not None:
                    app.polls_left -= 1
                    app.polls_left > 0 or self.everything.pop(app.name)
                return self._app(app)
            case "delete_app":
                if app.machines and request.query.get("force") != "true":
                    return self.refuse("delete_app: it has machines, and no force=true", 412)
                self.vms.gone(app.name)
                self.everything[app.name] = App(app.name, app.network, 0, polls_left=self.delete_polls if app.polls_left is None else app.polls_left)
                return web.Response(status=202)
            case "set_secrets":
                if any(not isinstance(value, str | None) for value in body["values"].values()):
                    return self.refuse("set_secrets: a value is no string")
                app.secrets, app.version = {key: value for key, value in (app.secrets | body["values"]).items() if value is not None}, app.version + 1
                return {"secrets": [{"name": key, "digest": "d"} for key in app.secrets], "version": app.version}
            case "list_ips":
                return {"ips": app.ips}
            case "allocate_ip":
                return self._allocate_ip(app, body["type"], body)
            case "list_volumes":
                return list(app.volumes.values())
            case "create_volume":
                if not self._capacity(body["region"]):
                    return 400, {"error": "no capacity"}
                id = f"vol_{next(self._numbers):014x}"
                app.volumes[id] = {"id": id, "name": body["name"], "state": "created", "size_gb": body["size_gb"], "region": body["region"], "attached_machine_id": None}
                return app.volumes[id]
            case "delete_volume":
                return app.volumes.pop(request.match_info["volume"], (404, {"error": "volume not found"}))
            case "list_machines":
                return [self._machine(machine) for machine in app.machines.values()]
            case "create_machine":
                return await self._create_machine(app, body, body["config"])
            case "org_machines":
                first, size = int(request.query.get("cursor", "0")), min(int(request.query.get("limit", "1000")), 1000)
                found = [self._machine(machine) | {"app_name": machine.app} for machine in self.machines]
                return {"machines": found[first:first + size], "next_cursor": str(first + size) if first + size < len(found) else "", "error_regions": self.error_regions}
            case "regions":
                return {"nearest": "iad", "regions": [{"code": "iad", "name": "Ashburn"}, {"code": "ewr", "name": "Secaucus"}]}
            case "current_tokens":
                return {"tokens": [{"token_id": "t", "org_slug": ORG, "organization": ORG, "apps": [], "user": ""}]}

    def _create_app(self, name: str, network: str, org: str) -> Any:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,61}", name) or not re.fullmatch(r"[a-z][a-z0-9-]*", network) or org != ORG:
            return self.refuse(f"create_app: {name}, {network}, {org}", 422)
        if name in self.everything:
            return 422, {"error": "Name has already been taken", "status": "name_taken"}
        self.networks.add(network)
        self.everything[name] = App(name, network, self.clock.monotonic() + self.hide_s)
        return web.json_response({"id": "x" + name, "created_at": 1}, status=201, headers={
            "Set-Cookie": f"fly_flaps_affinity=node-of-{name}; Path=/v1/apps/{name}"})

    def _allocate_ip(self, app: App, kind: str, body: dict) -> Any:
        private, number = kind == "private_v6", next(self._numbers)
        if kind not in ("private_v6", "shared_v4", "v6") or not private and {"org_slug", "network"} & set(body):
            return self.refuse(f"allocate_ip: {body}")
        if body.get("network", "default") not in self.networks:
            return self.refuse("allocate_ip: network not found", 400, {"error": "network not found"})
        app.ips.append({"ip": f"fdaa::{number}" if private else f"2a09::{number}" if kind == "v6" else "66.241.124.1", "region": "global", "service_name": "",
                        "shared": kind == "shared_v4", "network": {"name": body.get("network", ""), "org_slug": ORG} if private else None})
        return app.ips[-1]

    async def _create_machine(self, app: App, body: dict, config: dict) -> Any:
        if not config.get("image") or any(machine.name == body.get("name") for machine in app.machines.values()) or app.polls_left is not None:
            return self.refuse(f"create_machine: {body}", 422)
        region, id = self._capacity(body.get("region", "iad")), f"{next(self._numbers):014x}"
        if not region:
            return 503, {"error": "insufficient resources available to fulfill request", "status": "insufficient_capacity"}
        for mount in config.get("mounts", []):
            volume = app.volumes.get(mount["volume"], {"region": ""})
            if volume["region"] != region or volume["attached_machine_id"]:
                return self.refuse("create_machine: the volume is not there", 412)
            volume["attached_machine_id"] = id
        app.machines[id] = Machine(id, app.name, body.get("name") or f"name-{id}", region, config, f"01H{id.upper()}")
        if body.get("skip_launch"):
            await self.clock.sleep(self.pull_s)
            app.machines[id].pulled = True
        else:
            self._launch(app.machines[id], body)
        return self._machine(app.machines[id])

    async def _act_on_machine(self, name, request, body, app, machine):
        before, metadata = self.state(machine), machine.config.setdefault("metadata", {})
        match name:
            case "get_machine":
                return self._machine(machine)
            case "update_machine":
                if not body["config"].get("image") or body.get("current_version", machine.instance_id) != machine.instance_id:
                    return self.refuse(f"update_machine: {body}", 412)
                machine.config, machine.instance_id = body["config"], f"01H{next(self._numbers):014X}"
                if not body.get("skip_launch"):
                    self._launch(machine, body)
                return self._machine(machine)
            case "delete_machine":
                if before not in ("stopped", "suspended") and request.query.get("force") != "true":
                    return self.refuse("delete_machine: it runs", 412)
                for volume in app.volumes.values():
                    volume["attached_machine_id"] = None if volume["attached_machine_id"] == machine.id else volume["attached_machine_id"]
                self.vms.gone(app.name)
                return {"ok": bool(app.machines.pop(machine.id))}
            case "wait_machine":
                return await self._wait(app, machine, request.query)
            case "start_machine":
                if before in ("created", "suspending", "replacing"):
                    return 412, {"error": f"failed_precondition: unable to start machine from current state: '{before}'"}
                before == "started" or self._launch(machine)
                if before == "suspended":
                    machine.started_at = self.clock.monotonic() + self.resume_s
                return {"previous_state": before, "migrated": False, "new_host": ""}
            case "stop_machine":
                machine.rest = "stopped"
                return {"ok": True}
            case "suspend_machine":
                if before != "started":
                    return self.refuse(f"suspend_machine: it is {before}", 412)
                if machine.config.get("guest", {}).get("memory_mb", 0) > 2048:
                    return self.refuse("suspend_machine: over 2 GB", 412)
                machine.rest, machine.freezes_at = "suspending", self.clock.monotonic() + self.freeze_s
                return {"ok": True}
            case "restart_machine":
                self._launch(machine)
                return {"ok": True}
            case "get_metadata":
                return metadata
            case "set_metadata":
                metadata[request.match_info["key"]] = body["value"]
                return web.Response(status=204)
            case "delete_metadata":
                metadata.pop(request.match_info["key"], None)
                return web.Response(status=204)

    async def _wait(self, app: App, machine: Machine, query: Any) -> Any:
        timeout, wanted, rests = query.get("timeout", "60"), set(query.get("state", "started").split(",")), {"started", "stopped", "suspended", "failed"}
        if not timeout.isdigit() or not 1 <= int(timeout) <= 60 or not wanted <= rests | {"destroyed", "settled"}:
            return self.refuse(f"wait_machine: {dict(query)}")
        if query.get("version", machine.instance_id) != machine.instance_id:
            return self.refuse("wait_machine: another version", 404)
        deadline = self.clock.monotonic() + int(timeout)
        while (state := self.state(machine)) not in wanted | (rests if "settled" in wanted else set()):
            if self.clock.monotonic() >= deadline or machine.id not in app.machines:
                return 408, {"error": f"deadline_exceeded: machine failed to reach desired state, currently {state}"}
            await self.clock.sleep(max(0.05, min(deadline, machine.started_at) - self.clock.monotonic()) if state == "starting" else 0.2)
        return {"ok": True, "state": state, "version": machine.instance_id, "event_id": "01M"}


# --- VMs ---

@dataclass
class Command:
    text: str
    media: list
    key: str
    bearer: str


class FakeVM:
    """One engineer's VM: runs a text once per key, and can be away, busy, slow, dying or odd."""

    def __init__(self, app: str, started: Callable[[], bool], env: dict[str, str]):
        self.app, self.started, self.env = app, started, env
        self.asked: list[Command] = []  # every POST /command
        self.ran: list[str] = []  # the texts it really ran
        self.stored: dict[str, Any] = {}
        self.away: int | str = 0  # a status of the proxy, or "cut": every connection is dropped
        self.script: deque[dict] = deque()  # for the next commands: {"status", "body", "headers"}, {"cut": "before" | "after"}, {"answer"}
        self.busy, self.gate, self.running, self.stops = False, None, "", True
        self.busy, self.gate, self.running, self.stops = False, None, "", True
        self.so_far, self.cut_short = "so far", False
        self.health: dict[str, Any] = {"status": "ok"}
        self.asked_asleep = 0  # how often it was asked something while its machine was resting
        self.answer: Callable[[str], Any] = lambda text: {"text": f"ran: {text}", "images": [], "exitCode": 0, "durationMs": 1}

    def is_up(self) -> bool:
        return self.started() and not self.away

    def then(self, *reactions: dict) -> None:
        self.script.extend(reactions)

    def holds(self) -> Gate:
        """Commands run until the gate is opened."""
        self.gate = Gate()
        return self.gate


async def in_chunks(content: list[bytes]):
    for chunk in content:
        yield chunk


class FakeVMs(Fake):
    """All VMs behind one server, as Fly's proxy would reach them: `/{app}/...`; a VM whose machine does not run answers 503."""

    routes = (("GET", "/{app}/health", "health"), ("POST", "/{app}/command", "command"), ("GET", "/{app}/images/{name}", "image"), ("POST", "/{app}/cancel", "cancel"))

    def __init__(self, clock: FakeClock):
        super().__init__(clock)
        self.all: dict[str, FakeVM] = {}
        self.images: dict[str, tuple[str, bytes | list[bytes]]] = {}  # type and content, in chunks of untold length if it is a list
        self.open_to_all = False  # a store of pictures, which wants no token

    def __getitem__(self, app: str) -> FakeVM:
        return self.all[app]

    def boot(self, app: str, started: Callable[[], bool], env: dict[str, str]) -> None:
        vm = self.all.setdefault(app, FakeVM(app, started, env))
        vm.started, vm.env = started, env

    def gone(self, app: str) -> None:
        if app in self.all:
            self.all[app].started = lambda: False

    async def admit(self, request, seen):
        vm = self.all.get(request.match_info["app"])
        if vm is None or not vm.started():
            if vm is not None:
                vm.asked_asleep += 1
            return web.Response(status=503, text="no machine runs")
        bearer = seen.headers.get("Authorization", "")
        if seen.name == "command":
            vm.asked.append(Command(seen.body["text"], seen.body["media"], seen.headers.get("Idempotency-Key", ""), bearer))
            if set(seen.body) - {"new"} != {"text", "media"} or seen.body.get("new", True) is not True or not vm.asked[-1].key or "Cookie" in seen.headers:
                return self.refuse(f"command: {seen.body} {dict(seen.headers)}")
        if seen.name != "health" and not self.open_to_all and bearer != f"Bearer {vm.env.get('COCKPIT_TOKEN')}":
            return self.refuse(f"{seen.name}: not this VM's token", 401)
        if vm.away:
            return cut(request) if vm.away == "cut" else web.Response(status=vm.away, text="<h1>proxy error</h1>")
        return None

    async def act(self, name, request, body):
        if name == "health":
            return self.all[request.match_info["app"]].health
        if name == "cancel":
            return self.cancel(self.all[request.match_info["app"]], request.headers["Idempotency-Key"])
        if name == "image":
            kind, content = self.images.get(request.match_info["name"], ("text/html", b"no such image"))
            if isinstance(content, list):
                return web.Response(body=in_chunks(content), content_type=kind)
            return web.Response(body=content, content_type=kind)
        vm, key = self.all[request.match_info["app"]], request.headers["Idempotency-Key"]
        reaction = vm.script.popleft() if vm.script else {}
        if reaction.get("cut") == "before":
            return cut(request)
        if "status" in reaction:
            return web.Response(status=reaction["status"], body=reaction.get("body", b"oops"), headers=reaction.get("headers"))
        if key not in vm.stored and vm.busy:
            return 409, {"error": "busy"}
        if key not in vm.stored:
            vm.busy, vm.running, vm.cut_short = True, key, False
            vm.ran.append(body["text"])
            if vm.gate:
                vm.gate.arrived.set()
                await vm.gate.opened.wait()
            if vm.cut_short:
                await self.clock.clock.sleep(1)
                reaction = {"answer": {"text": vm.so_far, "images": [], "exitCode": 130, "durationMs": 1}}
            vm.stored[key], vm.busy = reaction.get("answer", vm.answer(("anew " if body.get("new") else "") + body["text"])), False
        if reaction.get("cut") == "after":
            return cut(request)
        answer = vm.stored[key]
        return web.Response(body=answer, content_type="application/json", headers={"Set-Cookie": "a=b"}) if isinstance(answer, bytes) else answer

    def cancel(self, vm: FakeVM, key: str) -> Any:
        if not vm.stops:
            return 404, {"error": "no such thing"}
        stopped = vm.busy and key in ("", vm.running)
        if stopped:
            vm.cut_short = True
            gate, vm.gate = vm.gate, None
            gate.open()
        return {"stopped": stopped}


# --- Twilio ---

SEND_FIELDS = set("""To StatusCallback ApplicationSid MaxPrice ProvideFeedback Attempt ValidityPeriod ForceDelivery ContentRetention AddressRetention
    SmartEncoded PersistentAction TrafficType ShortenUrls ScheduleType SendAt SendAsMms ContentVariables RiskCheck From FallbackFrom
    MessagingServiceSid Body MediaUrl ContentSid""".split())
LIST_FIELDS = {"To", "From", "DateSent", "DateSent<", "DateSent>", "PageSize", "Page", "PageToken"}
SMART = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\u00a0": " ", "`": "'", "\t": "    "})


@dataclass
class Answer:
    """What the gateway answered."""
    status: int
    text: str
    headers: Any

    @property
    def body(self) -> Any:
        return json.loads(self.text)

    @property
    def said(self) -> str:
        """The text in a TwiML answer."""
        return "".join(ElementTree.fromstring(self.text.encode()).itertext())


def sign(url: str, form: dict[str, str], token: str = AUTH_TOKEN) -> str:
    text = url + "".join(name + form[name] for name in sorted(form))
    return base64.b64encode(hmac.new(token.encode(), text.encode(), hashlib.sha1).digest()).decode()


class FakeTwilio(Fake):
    """Twilio's Messages resource, strict, and the Twilio that signs and delivers texts to the gateway."""

    ROOT = f"/2010-04-01/Accounts/{ACCOUNT}"
    routes = (("POST", ROOT + "/Messages.json", "send"), ("GET", ROOT + "/Messages.json", "list"), ("GET", ROOT + "/Messages/{sid}.json", "fetch"),
              ("GET", ROOT + "/Messages/{sid}/Media{media:.*}", "media"),
              ("GET", ROOT + ".json", "account"), ("GET", ROOT + "/IncomingPhoneNumbers.json", "numbers"))

    def __init__(self, clock: FakeClock):
        super().__init__(clock)
        self.messages: list[dict] = []  # oldest first
        self.media: dict[str, tuple[str, bytes] | str | dict] = {}  # path: type and content, where it redirects to, or a list
        self.public = PUBLIC
        self.gateway, self.page_cap, self.session = "", 1000, None  # the gateway: where it really listens
        self._numbers = itertools.count(1)
        self.skew = 0.0  # of its clock
        self.number = {"phone_number": NUMBER, "sms_url": PUBLIC + "/sms", "sms_method": "POST", "sms_application_sid": ""}

    def fails(self, name, status, times=1, body=None, headers=None, after=False, code: int | None = None):
        super().fails(name, status, times, body or {"code": code or status * 100, "message": "by script", "status": status}, headers, after)

    @property
    def sent(self) -> list[tuple[str, str]]:
        return [(message["to"], message["body"]) for message in self.messages if message["direction"] == "outbound-api"]

    def sent_to(self, phone: str) -> list[str]:
        return [body for to, body in self.sent if to == phone]

    @property
    def media_sent(self) -> list[str]:
        return [message["media"] for message in self.messages if message["media"]]

    @property
    def callbacks(self) -> list[str]:
        return [message["callback"] for message in self.messages if message["callback"]]

    async def reports(self, status: str, code: int | str = "", message: dict | None = None) -> Answer:
        """Tells the gateway, at the address it asked for, what became of a message; of the last one if none is given."""
        message = message or [message for message in self.messages if message["callback"]][-1]
        form = {"MessageSid": message["sid"], "MessageStatus": status, "SmsSid": message["sid"], "SmsStatus": status, "AccountSid": ACCOUNT, "From": message["from"],
                "To": message["to"], "ApiVersion": "2010-04-01"} | ({"ErrorCode": str(code)} if code else {})
        return await self.posts(message["callback"].removeprefix(PUBLIC), form)

    async def read(self, request):
        return list((await request.post()).items())

    async def admit(self, request, seen):
        if seen.headers.get("Authorization") != f"Basic {base64.b64encode(f'{ACCOUNT}:{AUTH_TOKEN}'.encode()).decode()}":
            return self.refuse("authenticate", 401, {"code": 20003, "message": "Authenticate", "status": 401})
        if odd := {name for name, _ in seen.body} - SEND_FIELDS | set(seen.query) - {"list": LIST_FIELDS, "numbers": {"PhoneNumber"}}.get(seen.name, set()):
            return self.refuse(f"{seen.name}: unknown fields {odd}")
        return None

    def _add(self, direction: str, to: str, sender: str, body: str, sid: str | None = None, media: str = "", callback: str = "") -> dict:
        sid, date = sid or f"SM{next(self._numbers):032x}", format_datetime(datetime.fromtimestamp(int(self.clock.now() + self.skew), UTC))
        self.messages.append({"sid": sid, "account_sid": ACCOUNT, "api_version": "2010-04-01", "direction": direction, "to": to, "from": sender, "body": body,
                              "media": media, "callback": callback, "status": "received" if direction == "inbound" else "queued", "date_created": date, "date_sent": date, "date_updated": date,
                              "num_media": "0", "num_segments": "1", "error_code": None, "error_message": None, "price": None, "messaging_service_sid": None,
                              "subresource_uris": {"media": f"{self.ROOT}/Messages/{sid}/Media.json"}, "uri": f"{self.ROOT}/Messages/{sid}.json"})
        return self.messages[-1]

    async def act(self, name, request, body):
        if name == "fetch":
            return next((message for message in self.messages if message["sid"] == request.match_info["sid"]), (404, {"code": 20404, "status": 404}))
        if name == "account":
            return {"sid": ACCOUNT, "status": "active"}
        if name == "numbers":
            return {"incoming_phone_numbers": [self.number] if request.query["PhoneNumber"] == NUMBER else []}
        if name == "list":
            return self._list(request.path, dict(request.query))
        if name == "media":
            found = self.media.get(request.path)
            if found is None:
                return 404, {"code": 20404, "status": 404}
            if isinstance(found, dict):
                return found
            return web.Response(status=307, headers={"Location": found}) if isinstance(found, str) else web.Response(body=found[1], content_type=found[0])
        form = dict(body)
        text = form.get("Body", "")
        if not re.fullmatch(r"(whatsapp:)?\+[1-9]\d{6,14}", form.get("To", "")) or not form.get("From") or not (text or "MediaUrl" in form):
            return self.refuse(f"send: {form}", body={"code": 21604, "message": "To, From or Body is missing", "status": 400})
        if len(text.encode("utf-16-le")) > 3200:
            return self.refuse("send: body over 1600 units", body={"code": 21617, "message": "too long", "status": 400})
        return 201, self._add("outbound-api", form["To"], form["From"], text.translate(SMART) if form.get("SmartEncoded") == "true" else text,
                              media=form.get("MediaUrl", ""), callback=form.get("StatusCallback", ""))

    def _list(self, path: str, query: dict[str, str]) -> Any:
        found = [message for message in reversed(self.messages) if query.get("To", message["to"]) == message["to"] and query.get("From", message["from"]) == message["from"]]
        for name, sign in (("DateSent>", 1), ("DateSent<", -1)):
            if name in query:
                if not re.fullmatch(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?", query[name]):
                    return self.refuse(f"list: {name}={query[name]}", body={"code": 20001, "message": "bad date", "status": 400})
                bound = datetime.fromisoformat(query[name].replace("Z", "")).replace(tzinfo=UTC)
                found = [message for message in found if (parsedate_to_datetime(message["date_sent"]) - bound).total_seconds() * sign >= 0]
        size, page = min(int(query.get("PageSize", "50")), self.page_cap), int(query.get("Page", "0"))
        more = f"{path}?{urlencode(query | {'Page': page + 1, 'PageToken': f'PA{page + 1}'})}" if (page + 1) * size < len(found) else None
        return {"messages": found[page * size:(page + 1) * size], "page": page, "page_size": size, "next_page_uri": more}

    def missed(self, phone: str, body: str, to: str = NUMBER, sid: str | None = None) -> str:
        """A text that arrived at Twilio while no gateway listened."""
        known = any(message["sid"] == sid for message in self.messages)
        return sid if known else self._add("inbound", to, phone, body, sid)["sid"]

    async def texts(self, phone: str, body: str, **more: str) -> Answer:
        """A text from a phone, signed and delivered; `more` are further form fields (MessageSid repeats an earlier one)."""
        sid = self.missed(phone, body, more.get("To", NUMBER), more.pop("MessageSid", None))
        form = {"MessageSid": sid, "SmsSid": sid, "SmsMessageSid": sid, "AccountSid": ACCOUNT, "From": phone, "To": NUMBER, "Body": body, "NumMedia": "0",
                "NumSegments": "1", "SmsStatus": "received", "ApiVersion": "2010-04-01", "FromCity": "", "FromCountry": "US"} | more
        return await self.posts("/sms", form)

    async def posts(self, path: str, form: dict[str, str], signature: str | None = None, headers: dict[str, str] | None = None) -> Answer:
        """A signed webhook; an empty signature is left out."""
        signed = {"X-Twilio-Signature": sign(self.public + path, form) if signature is None else signature} | (headers or {})
        async with self.session.post(self.gateway + path, data=form, headers={name: value for name, value in signed.items() if value}) as response:
            answer = Answer(response.status, await response.text(), response.headers)
        assert_described("POST", path, answer)
        return answer


# --- World ---

API = cockpit.describe_api(cockpit.CALLS, "")


def operation(method: str, path: str) -> dict[str, Any] | None:
    """What /openapi.json says of a call."""
    path = path.partition("?")[0]
    found = [calls.get(method.lower()) for template, calls in API["paths"].items() if re.fullmatch(re.sub("{.*?}", "[^/]+", template), path)]
    return found[0] if found else None


def assert_described(method: str, path: str, answer: Answer) -> None:
    """Whatever a call of the gateway answers, its status, type, code and a record's fields stand in /openapi.json."""
    if (described := operation(method, path)) is None:
        return
    response = described["responses"].get(str(answer.status), described["responses"]["default"])
    kind = answer.headers.get("Content-Type", "").partition(";")[0]
    assert kind in response["content"] or not answer.text, (method, path, answer.status, kind)
    if kind == "application/problem+json":
        assert answer.status == cockpit.STATUS_OF[answer.body["code"]], (method, path, answer.text)
    if reference := response["content"].get(kind, {}).get("schema", {}).get("$ref"):
        schema = API["components"]["schemas"][reference.rpartition("/")[2]]
        assert set(schema["required"]) <= set(answer.body), (method, path, answer.text)
        assert kind == "application/problem+json" or set(answer.body) <= set(schema["properties"]), (method, path, answer.text)


def settings(**changes: Any) -> dict[str, str]:
    """A complete production environment; the addresses of the fakes are filled in by `World`."""
    return {"COCKPIT_ENV": "production", "COCKPIT_API_KEY": KEY, "COCKPIT_SECRET": SECRET, "PUBLIC_URL": PUBLIC, "FLY_API_TOKEN": FLY_TOKEN,
            "FLY_ORG": ORG, "TWILIO_ACCOUNT_SID": ACCOUNT, "TWILIO_AUTH_TOKEN": AUTH_TOKEN, "TWILIO_PHONE_NUMBER": NUMBER, "VM_IMAGE": "vm-image:7",
            "RECONCILE_S": "0", "BACKFILL_S": "0", "DRAIN_S": "0.05", "ONBOARDING_URL": "https://signup.example.com", "TEXT_LIMIT": "0"} | {
        name: str(value) for name, value in changes.items()}


def stamp(app: str, phone: str, gateway_id: str, *, secret: str = SECRET, pairing: str = "0:paired") -> dict[str, str]:
    """The metadata by which a machine proves whose it is, as the contract words it."""
    mark = hmac.digest(secret.encode(), f"owner:{app}:{phone}:{gateway_id}:{pairing}".encode(), "sha256")
    return {"cockpit_gateway": f"cockpit.example.com/{gateway_id}", "cockpit_phone": phone, "cockpit_pairing": pairing,
            "cockpit_owner": base64.urlsafe_b64encode(mark).decode().rstrip("=")}


def sign_up_form(phone: str = ANN, **more: Any) -> dict[str, Any]:
    return {"phone_number": phone, "github_token": GITHUB, "api_keys": {"ANTHROPIC_API_KEY": ANTHROPIC}} | more


class Threads(ThreadPoolExecutor):
    """The loop's threads, which tell whether any is at work."""

    at_work = 0
    held: threading.Event | None = None

    def holds(self) -> threading.Event:
        """The next work waits for this event."""
        self.held = threading.Event()
        return self.held

    def submit(self, work: Callable, *given: Any, **more: Any) -> Future:
        self.at_work += 1
        held, self.held = self.held, None
        outcome = Future()
        super().submit(self._work, outcome, held, lambda: work(*given, **more), asyncio.get_running_loop())
        return outcome

    def _work(self, outcome: Future, held: threading.Event | None, work: Callable, loop: asyncio.AbstractEventLoop) -> None:
        try:
            held is None or held.wait(10)
            if outcome.set_running_or_notify_cancel():
                outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            loop.call_soon_threadsafe(self._ended)  # behind all that the outcome set off

    def _ended(self) -> None:
        self.at_work -= 1


def is_writing(store: cockpit.MessageStore) -> bool:
    """Whether its thread is at work, or has something to write that the disk did not refuse yet."""
    return store.at_work > 0 or store.writer is not None and not store.trouble


class World:
    """One gateway between a Fly, a Twilio and VMs of its own, with its files in a folder of its own."""

    def __init__(self, folder: Path, clock: FakeClock):
        self.clock, self.disks = clock, folder
        self.vms = FakeVMs(clock)
        self.fly, self.twilio = FakeFly(clock, self.vms), FakeTwilio(clock)
        self.fakes = (self.fly, self.twilio, self.vms)
        self.server: Server | None = None
        self.children: list[Child] = []
        self.file = folder / "disk0" / "routes.json"
        self.file.parent.mkdir()

    async def open(self) -> None:
        self.threads = Threads()
        asyncio.get_running_loop().set_default_executor(self.threads)
        for fake in self.fakes:
            await fake.server.start()
        self.session = self.twilio.session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        self.environ = settings(FLY_API_HOSTNAME=self.fly.server.url, TWILIO_API_URL=self.twilio.server.url, VM_URL=self.vms.server.url + "/{app}")

    async def close(self) -> None:
        for fake in self.fakes:
            fake.opens_all()
        await self.stop()
        for child in self.children:
            await child.ends(signal.SIGKILL)
            assert_nothing_secret(child.log)
        await self.session.close()
        for fake in self.fakes:
            await fake.server.close()
        for fake in self.fakes:
            assert not fake.objections, f"{type(fake).__name__} refused what cockpit asked: {fake.objections}"

    async def start(self, **changes: Any) -> None:
        self.environ |= {name: str(value) for name, value in changes.items()}
        app = cockpit.make_app(cockpit.Settings.from_env(self.environ | {"ROUTES_FILE": str(self.file)}), self.clock.clock)
        self.server = Server(app, runner=cockpit.GatewayRunner(app, shutdown_timeout=0.02))
        self.clock.is_writing = lambda: self.threads.at_work > 0 or cockpit.GATEWAY in app and is_writing(app[cockpit.GATEWAY].messages)
        await self.clock.run(self.server.start())
        self.twilio.gateway = self.server.url

    async def stop(self) -> None:
        if self.server is not None:  # time stands still meanwhile
            await asyncio.wait_for(self.server.close(), 10)
            self.server = None

    async def restart(self, **changes: Any) -> None:
        await self.stop()
        await self.start(**changes)

    async def crash(self, held: threading.Event | None = None) -> None:
        """What SIGKILL leaves: the files of this moment; whatever the old process still does, also what was held, reaches nobody."""
        disk = self.disks / f"disk{len(list(self.disks.iterdir()))}"
        shutil.copytree(self.file.parent, disk, ignore=shutil.ignore_patterns("*.tmp"))  # a write may be under way
        self.file = disk / "routes.json"
        for fake in self.fakes:
            fake.deaf = True
            fake.forgets_its_callers()
        held and held.set()
        await self.stop()
        for fake in self.fakes:
            fake.deaf = False

    async def dies_owing(self, command: str, owed: str) -> None:
        """A SIGKILL behind the transaction that says what is owed to a command of Ann's, and before anything that follows from it."""
        written = self.threads.holds()
        asked = asyncio.ensure_future(self.twilio.texts(ANN, command))
        await real_until(lambda: any(owed in record for record, in self.rows("SELECT record FROM vms")))
        await self.crash(written)
        await asyncio.gather(asked, return_exceptions=True)

    def loses_its_routes(self) -> None:
        for name in ("routes.json", "routes.json.bak"):
            self.file.with_name(name).unlink(missing_ok=True)

    async def crash_and_restart(self, **changes: Any) -> None:
        await self.crash()
        await self.start(**changes)

    async def spawn(self, *, wait: bool = True, is_fork: bool = True, **changes: Any) -> "Child":
        """The gateway as a process of its own (the clock must be live)."""
        port = free_port()
        self.environ |= {name: str(value) for name, value in changes.items()}
        return await self.adopt(await Child.start(self.environ | {"ROUTES_FILE": str(self.file), "HOST": "127.0.0.1"}, port, self.disks, is_fork=is_fork), wait)

    async def adopt(self, child: "Child", wait: bool = True) -> "Child":
        self.children.append(child)
        if wait:
            await child.listens()
            self.twilio.gateway = child.url
        return child

    async def ask(self, method: str, path: str, *, key: str | None = KEY, headers: dict[str, str] | None = None, **more: Any) -> Answer:
        sent = ({"Authorization": f"Bearer {key}"} if key is not None else {}) | ({"Accept": "text/html"} if path == "/" else {}) | (headers or {})
        async with self.session.request(method, self.twilio.gateway + path, headers=sent, allow_redirects=False, **more) as response:
            answer = Answer(response.status, await response.text(), response.headers)
        assert_described(method, path, answer)
        return answer

    async def call(self, method: str, path: str, **more: Any) -> Answer:
        """Asks while letting time run."""
        return await self.clock.run(self.ask(method, path, **more))

    async def provision(self, phone: str = ANN, **more: Any) -> Answer:
        return await self.call("POST", "/provision", json=sign_up_form(phone, **more))

    async def sign_up(self, phone: str = ANN, **more: Any) -> FakeVM:
        answer = await self.provision(phone, **more)
        assert answer.status == 201, answer.text
        return self.vms[answer.body["vm_id"]]

    async def ready(self, **changes: Any) -> FakeVM:
        """A gateway with a VM for Ann."""
        await self.start(**changes)
        return await self.sign_up()

    async def occupies(self, vm: FakeVM, body: str) -> Gate:
        """A text that its VM runs until the gate is opened."""
        gate = vm.holds()
        await self.text(body)
        await self.clock.until(gate.arrived.is_set)
        return gate

    async def text(self, body: str, phone: str = ANN, **more: str) -> Answer:
        """A text that is taken in."""
        answer = await self.twilio.texts(phone, body, **more)
        assert answer.status == 200, answer.text
        return answer

    async def begin(self, fake: Fake, call: str, *, after: bool = False, **more: Any) -> tuple[Gate, asyncio.Future]:
        """A sign-up that is being held at a call."""
        gate = fake.holds(call, after=after)
        job = asyncio.ensure_future(self.ask("POST", "/provision", json=sign_up_form(**more)))
        await self.clock.until(gate.arrived.is_set)
        return gate, job

    async def hears(self, *texts: str, phone: str = ANN, within: float = 120) -> None:
        """The phone hears exactly these texts, all told, in this order, and nothing more for the moment."""
        with contextlib.suppress(AssertionError):
            await self.clock.until(lambda: len(self.twilio.sent_to(phone)) >= len(texts), within)
        await self.clock.settle()
        assert self.twilio.sent_to(phone) == list(texts)

    async def leaves(self, vm: FakeVM, how: int | str) -> None:
        """The VM goes away: nobody listens ("refused"), connections are cut ("cut"), or the proxy answers with a status."""
        if how == "refused":
            await self.vms.server.refuse()
            await self.clock.settle()
        else:
            vm.away = how

    async def returns(self, vm: FakeVM) -> None:
        if not self.vms.server.listening:
            await self.vms.server.start()
        vm.away = 0

    @property
    def saved(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())

    @property
    def database(self) -> Path:
        return self.file.with_name(self.file.name + ".db")

    def rows(self, query: str) -> list[tuple]:
        """What the gateway's database says, as an operator would ask it."""
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            return database.execute(query).fetchall()


def zygote(source: str, program: str, orders: int) -> None:
    """What runs in a process of its own: it runs all of cockpit but the last lines, which start it; for each order a fork of it runs those, too."""
    import contextlib
    import json
    import os
    import socket
    import sys

    text, names = open(source, encoding="utf-8").read(), vars(sys.modules["__main__"])
    body, mark, end = text.rpartition('\nif __name__ == "__main__":')
    body, end = compile(body, source, "exec"), compile("\n" * body.count("\n") + mark + end, source, "exec")
    names["__file__"] = sys.argv[0] = program
    del sys.argv[1:]
    exec(body, names)
    orders = socket.socket(fileno=orders)
    while (given := socket.recv_fds(orders, 1, 2))[0] and os.fork():
        for number in given[1]:
            os.close(number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    if not given[0]:
        return
    control, output = given[1]
    with open(control, "rb", closefd=False) as told:
        environ, folder, arguments = json.loads(told.readline())
    if pid := os.fork():  # tells its number and how it ended
        os.close(output)
        os.write(control, b"%d\n" % pid)
        os.write(control, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    for number in (1, 2):
        os.dup2(output, number)
    orders.close()
    os.closerange(3, 100)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv += arguments
    exec(end, names)


class Forked:
    """A process that a zygote became, with what asyncio's own offer."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, *control: Any):
        self.pid, self.stdout, self.returncode = pid, stdout, None
        self._ended = asyncio.ensure_future(self._end(*control))

    async def _end(self, told: asyncio.StreamReader, control: asyncio.StreamWriter) -> int:
        with contextlib.closing(control):
            self.returncode = int(await told.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)


class Zygote:
    """Makes processes of cockpit that are as true as any (environment, folder, output, signals and end are their own), but that need not import it: this takes 0.3 s."""

    def __init__(self):
        self._orders, theirs = socket.socketpair()
        with theirs:
            program = f"{inspect.getsource(zygote)}\nzygote({str(HERE / 'cockpit.py')!r}, {Child.program!r}, {theirs.fileno()})"
            self._process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.DEVNULL, env={"PATH": os.environ["PATH"], "SSL_CERT_FILE": os.devnull},
                                             pass_fds=[theirs.fileno()], start_new_session=True)

    async def start(self, environ: dict[str, str], folder: Path, arguments: tuple[str, ...]) -> Forked:
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        with theirs:
            socket.send_fds(self._orders, [b"!"], [theirs.fileno(), writing])
        os.close(writing)
        told, control = await asyncio.open_connection(sock=ours)
        control.write(json.dumps([environ, str(folder), arguments]).encode() + b"\n")
        output = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), open(reading, "rb", buffering=0))
        return Forked(int(await told.readline()), output, told, control)

    def close(self) -> None:
        """Ends also what nobody waited for, because the session was interrupted."""
        self._orders.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Child:
    """cockpit as a real process; what it prints is kept in memory, so that a full disk cannot silence it."""

    program = str(HERE / "cockpit.py")
    zygote: Zygote

    def __init__(self, process: asyncio.subprocess.Process | Forked, port: int):
        self.process, self.port, self.url, self.printed = process, port, f"http://127.0.0.1:{port}", bytearray()
        self._reader = asyncio.ensure_future(self._read())

    @classmethod
    async def start(cls, environ: dict[str, str], port: int, folder: Path, *arguments: str, is_fork: bool = True) -> "Child":
        """Without certificates of authorities, which are read for a twentieth of a second: there is no TLS on loopback."""
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "SSL_CERT_FILE": os.devnull, "PYTHONDONTWRITEBYTECODE": "1", "PORT": str(port)} | environ
        if is_fork:
            return cls(await cls.zygote.start(environ, folder, arguments), port)
        return cls(await asyncio.create_subprocess_exec(sys.executable, str(HERE / "cockpit.py"), *arguments, cwd=folder, env=environ,
                                                        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT), port)

    async def _read(self) -> None:
        while part := await self.process.stdout.read(65536):
            self.printed += part

    @property
    def log(self) -> str:
        return self.printed.decode()

    async def listens(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            assert self.process.returncode is None and time.monotonic() < deadline, self.log
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                return writer.close()
            await asyncio.sleep(0.01)

    async def ends(self, number: int = 0, within: float = 8) -> int:
        """Sends a signal, if any, and waits for the exit status."""
        if number and self.process.returncode is None:
            self.process.send_signal(number)
        status = await asyncio.wait_for(self.process.wait(), within)
        await asyncio.wait_for(self._reader, within)
        return status


@contextlib.asynccontextmanager
async def a_world(clock: FakeClock):
    """In memory where the system offers it: an fsync then takes no time that a virtual clock would have to guess."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        world = World(Path(folder), clock)
        await world.open()
        try:
            yield world
        finally:
            await world.close()


def assert_nothing_secret(text: str) -> None:
    found = [secret for secret in SECRETS if secret in text] + re.findall(r"(?:\+|%2B)1555\d{7}", text)
    assert not set(found) - {NUMBER}, f"secrets or whole numbers in the log: {found}"


@pytest.fixture(autouse=True)
def nothing_secret_is_logged(caplog):
    caplog.set_level(logging.INFO)
    yield
    assert_nothing_secret("\n".join(str(vars(record)) for record in caplog.get_records("call")))


@pytest.fixture
async def world():
    """A gateway in virtual time, not yet started."""
    async with a_world(FakeClock()) as world:
        yield world


@contextlib.asynccontextmanager
async def a_live_world():
    async with a_world(FakeClock(live=True)) as world:
        world.fly.rate_limited, world.fly.hide_s = False, 0.0
        yield world


@pytest.fixture
async def live():
    """The surroundings of a gateway that is a process of its own, in real time."""
    async with a_live_world() as world:
        yield world


# This file is a plugin of pytest's, too.
pytest_plugins = [__name__]


def pytest_runtestloop(session: pytest.Session) -> None:
    """Many tests are run by two processes, where there are two cores; a few, or with a terminal to look into one, by pytest as ever."""
    option, is_worker = session.config.option, hasattr(session.config, "workerinput")
    has_cores = sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1
    if has_cores and len(session.items) > 60 and option.capture == "sys" and not (option.collectonly or option.usepdb or session.testsfailed or is_worker):
        session.config.pluginmanager.register(Pair(session))


class Pair:
    """A fork of this process runs tests, too: those in the browser, then others from the end until it meets the first, which reports all in the file's order."""

    def __init__(self, session: pytest.Session):
        self.config, self.items = session.config, {item: number for number, item in enumerate(session.items)}
        fork = multiprocessing.get_context("fork")
        self.taken, self.told, self.heard = fork.Array("b", len(self.items)), fork.Queue(), {}
        self.second = fork.Process(target=self.run_second)
        self.pages = [item for item in self.items if "tab" in item.fixturenames and self.takes(item)]
        self.second.start()

    def takes(self, item: pytest.Item) -> bool:
        with self.taken.get_lock():
            was_taken, self.taken[self.items[item]] = self.taken[self.items[item]], True
        return not was_taken

    # In the first

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self.takes(item):
            return None
        while item.nodeid not in self.heard and self.hears(1):
            pass
        hook, of_item = self.config.hook, {"nodeid": item.nodeid, "location": item.location}
        hook.pytest_runtest_logstart(**of_item)
        for report in self.heard.get(item.nodeid) or [pytest.TestReport(item.nodeid, item.location, {}, "failed", "The second process ended before this test did.", "call")]:
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(**of_item)
        return True

    def hears(self, within: float) -> bool:
        """Waits for the reports of a test; whether there may be more."""
        is_alive = self.second.is_alive()
        try:
            nodeid, reports = self.told.get(timeout=within)
        except queue.Empty:
            return is_alive
        self.heard[nodeid] = [self.config.hook.pytest_report_from_serializable(config=self.config, data=report) for report in reports]
        return True

    def pytest_sessionfinish(self) -> None:
        """However the session ends, the second ends what it has begun and closes what it has opened."""
        for item in self.items:
            self.takes(item)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.hears(0.02):
            pass
        self.second.kill()
        self.second.join()

    # In the second

    def run_second(self) -> None:
        global PORTS
        PORTS = itertools.count(next(PORTS) + 1, 2)
        os.setsid()  # Ctrl-C is for the first
        self.config.pluginmanager.unregister(name="terminalreporter")
        self.config.pluginmanager.register(Teller(self.config, self.told))
        firsts = {"tmp_path"}  # pytest removes its folder in the first alone
        others = (item for item in reversed(self.items) if not hasattr(item.obj, "beside") and firsts.isdisjoint(item.fixturenames) and self.takes(item))
        for item, following in itertools.pairwise(itertools.chain(self.pages, others, [None])):
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


class Teller:
    """Tells the first process of a pair what happens in the second."""

    def __init__(self, config: pytest.Config, told: multiprocessing.Queue):
        self.config, self.told, self.reports = config, told, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.told.put((nodeid, self.reports))
        self.reports = []


class Beside:
    """Tests with real processes mostly wait: they run beside the others, a few at a time, in a thread and an event loop of their own."""

    AT_ONCE = 5

    def __init__(self, items: list[pytest.Item]):
        self.loop, self.slots = asyncio.new_event_loop(), asyncio.Semaphore(self.AT_ONCE)
        self.thread = threading.Thread(target=self.loop.run_forever, name="beside")
        self.thread.start()
        self.outcomes = {item.nodeid: asyncio.run_coroutine_threadsafe(self._run(item.obj.beside, getattr(item, "callspec", None)), self.loop)
                         for item in items if hasattr(item.obj, "beside")}

    async def _run(self, test: Callable, call: Any) -> None:
        async with self.slots, a_live_world() as live:
            await test(live, **(call.params if call else {}))

    async def _end(self) -> None:
        """What still runs, because the session was interrupted, closes its world by itself."""
        for outcome in self.outcomes.values():
            outcome.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                for _ in range(self.AT_ONCE):
                    await self.slots.acquire()
        for task in (left := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()  # a fake's, which nobody waits for
        await asyncio.gather(*left, return_exceptions=True)
        await self.loop.shutdown_asyncgens()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="session", autouse=True)
def side(request):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(subprocess, "Popen", Popen)
        # Compiled once: each of a hundred processes would do it anew.
        patch.setattr(Child, "program", py_compile.compile(str(HERE / "cockpit.py"), f"{folder}/cockpit.py", doraise=True))
        gc.freeze()  # as cockpit does once it serves
        gc.set_threshold(50_000, 20, 50)
        patch.setattr(Child, "zygote", Zygote(), raising=False)
        side = Beside([] if multiprocessing.parent_process() else request.session.items)
        yield side
        side.close()
        Child.zygote.close()


def beside(test: Callable) -> Callable:
    """Marks a test of a live world that runs beside the others; its outcome is told at its own place."""
    def outcome(request, side, **params):
        side.outcomes[request.node.nodeid].result(120)
    signature = inspect.signature(test)
    others = [parameter for name, parameter in signature.parameters.items() if name != "live"]
    given = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("request", "side")]
    outcome.__name__, outcome.__doc__, outcome.__signature__, outcome.beside = test.__name__, test.__doc__, signature.replace(parameters=given + others), test
    return outcome


# --- Settings ---

REQUIRED = ("COCKPIT_API_KEY", "COCKPIT_SECRET", "PUBLIC_URL", "FLY_API_TOKEN", "TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "TWILIO_PHONE_NUMBER")


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(cockpit.SettingsError) as caught:
        cockpit.Settings.from_env(environ)
    return caught.value.problems


def test_production_names_every_missing_setting_at_once():
    found = problems({"COCKPIT_ENV": "production"})
    assert all(any(name in problem for problem in found) for name in REQUIRED), found


def test_a_complete_production_environment_is_accepted():
    cockpit.Settings.from_env(settings())
    cockpit.Settings.from_env(settings(COCKPIT_API_KEY=f"{KEY},{'k' * 16}", COCKPIT_SECRET=f"{SECRET},{'s' * 32}", TWILIO_AUTH_TOKEN="one,two"))


@pytest.mark.parametrize("name, value", [
    ("COCKPIT_ENV", "staging"), ("COCKPIT_API_KEY", "fifteen-letters"), ("COCKPIT_API_KEY", KEY + ",short"), ("COCKPIT_SECRET", "s" * 31),
    ("PUBLIC_URL", "http://cockpit.example.com"), ("PUBLIC_URL", "cockpit.example.com"), ("PORT", "http"), ("PORT", "70000"),
    ("TWILIO_PHONE_NUMBER", "555-0000"), ("VM_CPUS", "0"), ("VM_MEMORY_MB", "lots"), ("VM_NETWORK", "secret"), ("VM_COMMAND_TIMEOUT_S", "nan"),
    ("PROVISION_TIMEOUT_S", "-1"), ("PROVISION_LIMIT", "1e999"), ("QUEUE_LIMIT", "-5"), ("LOG_FORMAT", "xml"), ("FLY_API_HOSTNAME", "api.machines.dev"),
    ("VM_URL", "http://{nobody}:3000"), ("VM_URL", "http://{app}:port"), ("ONBOARDING_URL", "https://sign up.example.com"), ("TWILIO_API_URL", "ftp://api.twilio.com"), ("VM_APP_PREFIX", "Not A Name")])
def test_a_bad_value_is_reported_under_its_name(name, value):
    found = problems(settings(**{name: value}))
    assert len(found) == 1 and name in found[0], found


def test_missing_and_bad_values_are_reported_together():
    environ = settings(PORT="http")
    del environ["FLY_API_TOKEN"]
    found = " ".join(problems(environ))
    assert "PORT" in found and "FLY_API_TOKEN" in found


@pytest.mark.parametrize("port", ["http", "0", "80.5", "70000"])
def test_a_bad_port_is_reported_once_and_by_its_own_name(port):
    problem, = problems({"PORT": port})
    assert problem.startswith("PORT: ")


def test_half_of_a_twilio_api_key_is_reported():
    assert "TWILIO_API_SECRET" in " ".join(problems(settings(TWILIO_API_KEY="SK" + "0" * 32)))


def test_local_mode_needs_no_setting():
    cockpit.Settings.from_env({})


TWILIO_SETTINGS = {"TWILIO_ACCOUNT_SID": ACCOUNT, "TWILIO_AUTH_TOKEN": AUTH_TOKEN, "TWILIO_PHONE_NUMBER": NUMBER}


@pytest.mark.parametrize("environ, named", [
    ({"PUBLIC_URL": "https://tunnel.example.com"} | TWILIO_SETTINGS, "COCKPIT_API_KEY"),
    ({"HOST": "0.0.0.0"} | TWILIO_SETTINGS, "COCKPIT_API_KEY"),
    ({"PUBLIC_URL": "https://tunnel.example.com", "COCKPIT_API_KEY": KEY}, "TWILIO_"),
    ({"HOST": "0.0.0.0", "COCKPIT_API_KEY": KEY}, "TWILIO_"),
    ({"FLY_API_TOKEN": "fo1_real"}, "PUBLIC_URL")])
def test_local_mode_is_refused_where_the_internet_could_reach_it(environ, named):
    assert any(named in problem for problem in problems(environ))


def test_a_developer_may_text_a_local_vm_from_a_real_phone():
    cockpit.Settings.from_env({"PUBLIC_URL": "https://tunnel.example.com", "COCKPIT_API_KEY": KEY} | TWILIO_SETTINGS)


def test_an_agent_of_one_s_own_is_texted_from_real_phones_only_if_they_are_verified():
    real = {"TWILIO_ACCOUNT_SID": ACCOUNT, "TWILIO_AUTH_TOKEN": AUTH_TOKEN, "TWILIO_PHONE_NUMBER": NUMBER, "PUBLIC_URL": PUBLIC, "COCKPIT_API_KEY": KEY}
    assert [line for line in problems(real | {"LOCAL_AGENT": "claude"}) if line.startswith("VERIFY_PHONE")]
    for environ in (real | {"LOCAL_AGENT": "claude", "VERIFY_PHONE": "on"}, {"LOCAL_AGENT": "claude"}, real):
        assert cockpit.Settings.from_env(environ)


# --- Records and keys ---

@pytest.mark.parametrize("typed, number", [
    ("+15551234567", "+15551234567"), ("+1 (555) 123-4567", "+15551234567"), ("+49.151.1234567", "+491511234567"), ("+1234567", "+1234567"),
    ("+123456789012345", "+123456789012345")])
def test_a_number_is_e164_once_spaces_dots_dashes_and_parentheses_are_gone(typed, number):
    assert cockpit.normalise_phone(typed) == number


@pytest.mark.parametrize("typed", [
    "", "15551234567", "+05551234567", "+123456", "+1234567890123456", "+1555CALLNOW", "++15551234567", "+1555+1234567",
    "+١٥٥٥١٢٣٤٥٦٧",  # Arabic-Indic digits are digits to str.isdigit, not to a phone network
    "+15551234567\n", "+1555/1234567"])
def test_anything_else_is_no_number(typed):
    with pytest.raises(ValueError):
        cockpit.normalise_phone(typed)


def test_a_number_is_masked_for_logs():
    assert cockpit.mask_phone("+15551234567") == "+1555***4567"


@pytest.mark.parametrize("token, header", [
    ("fo1_deploy", "Bearer fo1_deploy"), ("Bearer fo1_deploy", "Bearer fo1_deploy"), ("fm2_a,fm2_b", "FlyV1 fm2_a,fm2_b"),
    ("FlyV1 fm2_a, fm1r_b\n", "FlyV1 fm2_a,fm1r_b"), ("Bearer FlyV1 fm2_a,fm1a_b", "FlyV1 fm2_a,fm1a_b")])
def test_a_fly_token_goes_out_under_the_scheme_it_needs(token, header):
    assert cockpit.fly_authorization(token) == header


# --- Time ---

async def test_pauses_have_full_jitter_and_grow_to_a_cap(world):
    await world.start()
    world.clock.drawn.clear()
    world.fly.fails("set_secrets", 503, times=4)
    await world.sign_up()
    ceilings = [high for low, high in world.clock.drawn[:4]]
    assert all(low == 0 for low, _ in world.clock.drawn[:4]), "full jitter draws from zero"
    assert ceilings == sorted(ceilings) and ceilings[0] < ceilings[-1] <= 60


async def test_retry_after_is_obeyed(world):
    await world.start()
    world.clock.pick = lambda low, high: low
    world.fly.fails("set_secrets", 429, headers={"Retry-After": "7"})
    await world.sign_up()
    first, second = world.fly.calls("set_secrets")
    assert 7 <= second.at - first.at < 9


async def test_fly_s_rate_limits_are_ridden_out_for_as_long_as_the_provisioning_may_take(world):
    await world.start()
    world.fly.fails("create_machine", 429, times=15)
    await world.sign_up()
    assert world.fly.count("create_machine") == 16


async def test_tasks_close_also_when_one_has_just_ended():
    tasks = cockpit.Tasks()
    ended = tasks.start(asyncio.sleep(0))
    while not ended.done():
        await asyncio.sleep(0)
    await tasks.close()


# --- Routes on disk ---

async def test_routes_are_private_readable_json_with_one_route_a_line(world):
    await world.start()
    vms = {phone: await world.sign_up(phone) for phone in (ANN, BOB)}
    assert stat.S_IMODE(world.file.stat().st_mode) == 0o600
    lines = world.file.read_text().splitlines()
    for phone, vm in vms.items():
        line, = (line for line in lines if f'"{phone}"' in line)
        assert vm.app in line and json.loads("{" + line.rstrip(",") + "}")[phone]["state"] == "ready"
    saved = world.saved
    assert saved["version"] == 1 and re.fullmatch(r"[a-z0-9]{8}", saved["gateway_id"])
    route = saved["routes"][ANN]
    assert {"vm_id", "machine_id", "vm_url", "region", "image", "state", "created_at"} <= set(route)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", route["created_at"])
    assert not any(secret in world.file.read_text() for secret in SECRETS)


async def test_unknown_fields_survive_a_rewrite(world):
    await world.start()
    await world.sign_up(ANN)
    await world.stop()
    saved = world.saved
    saved["routes"][ANN]["note"], saved["colour"] = {"kept": [1, None]}, "blue"
    world.file.write_text(json.dumps(saved))
    await world.start()
    await world.sign_up(BOB)
    assert (world.saved["routes"][ANN]["note"], world.saved["colour"]) == ({"kept": [1, None]}, "blue")
    assert world.saved["gateway_id"] == saved["gateway_id"]


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}])
async def test_a_file_in_another_layout_is_read_all_the_same(world, layout):
    vm = await world.ready()
    await world.sign_up(BOB)
    await world.stop()
    saved = {"note": {"routes": {"kept": 1}}} | world.saved
    world.file.write_text(json.dumps(saved, **layout))
    await world.start()
    await world.text("still there?")
    await world.hears("ran: still there?")
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    assert world.saved["note"] == saved["note"] and world.saved["routes"] == {BOB: saved["routes"][BOB]}


async def test_routes_survive_a_restart(world):
    vm = await world.ready()
    await world.restart()
    await world.text("still there?")
    await world.hears("ran: still there?")
    assert (await world.call("GET", f"/provision/{vm.app}")).body["state"] == "ready"


@pytest.mark.parametrize("damage", ["", '{"version": 1, "rou', "[]", '{"version": 1, "routes": {"+15551234567": 5}}',
                                    '{"version": 1, "routes": {"+15551234567": {"vm_id": "a", "pairing": "soon"}}}', "\x00" * 300])
async def test_an_unreadable_file_is_recovered_from_the_last_good_copy(world, damage):
    await world.ready()
    await world.stop()
    world.file.write_text(damage)
    await world.start()
    await world.text("hello")
    await world.hears("ran: hello")


@beside
async def test_a_file_of_a_newer_version_is_left_alone_though_an_old_copy_lies_beside_it(live):
    child = await live.spawn()
    await live.sign_up()
    await child.ends(signal.SIGTERM)
    newer = json.dumps(live.saved | {"version": 2})
    live.file.write_text(newer)
    child = await live.spawn(wait=False)
    assert await child.ends() == 1 and "version" in child.log and live.file.read_text() == newer


@pytest.mark.parametrize("damage", ['{"version": 1, "rou', "nonsense"])
@beside
async def test_a_start_that_can_read_neither_copy_is_refused_and_overwrites_nothing(live, damage):
    for suffix in ("", ".bak"):
        live.file.with_name(live.file.name + suffix).write_text(damage)
    child = await live.spawn(wait=False)
    assert await child.ends() != 0
    assert live.file.read_text() == damage and str(live.file) in child.log and "Traceback" not in child.log


@beside
async def test_a_second_process_on_the_same_file_is_refused(live):
    await live.spawn()
    second = await live.spawn(wait=False)
    assert await second.ends() != 0
    assert str(live.file) in second.log and "Traceback" not in second.log


@beside
async def test_the_file_is_whole_at_every_moment(live):
    """A reader racing with the writer, and then a kill, only ever see complete files."""
    child = await live.spawn()
    work = asyncio.gather(*map(live.provision, PHONES))
    seen = 0
    while not work.done():
        if live.file.exists():
            seen = max(seen, len(live.saved["routes"]))
        await asyncio.sleep(0.001)
        if seen >= 20:
            break
    await child.ends(signal.SIGKILL)
    assert live.saved["version"] == 1 and seen
    await asyncio.gather(work, return_exceptions=True)
    await live.spawn()


async def test_who_waits_for_a_write_that_a_shutdown_cuts_off_is_told_so(world):
    tasks = cockpit.Tasks()
    routes = cockpit.RouteStore(world.file, world.clock.clock, tasks)
    written = world.threads.holds()
    waiting = asyncio.ensure_future(routes.commit())
    await real_until(lambda: world.threads.held is None)
    await tasks.close()
    written.set()
    with pytest.raises(cockpit.StoreError, match="shutting down"):
        await asyncio.wait_for(waiting, 5)


async def test_a_write_that_a_shutdown_cuts_off_is_no_fault_when_nobody_waits_any_more(world, caplog):
    tasks = cockpit.Tasks()
    routes = cockpit.RouteStore(world.file, world.clock.clock, tasks)
    written = world.threads.holds()
    waiting = asyncio.ensure_future(routes.commit())
    await real_until(lambda: world.threads.held is None)
    waiting.cancel()
    await asyncio.wait({waiting})
    await tasks.close()
    written.set()
    await real_until(lambda: not world.threads.at_work)
    del routes, tasks, waiting
    gc.collect()
    assert "never retrieved" not in caplog.text


# --- Messages on disk ---

async def a_store(world: World) -> cockpit.MessageStore:
    clock = world.clock.clock
    store = cockpit.MessageStore(world.database, clock, cockpit.Tasks(), cockpit.Metrics(clock))
    await store.open()
    return store


def seen(sid: str) -> tuple[str, tuple]:
    return "INSERT INTO seen VALUES (?, ?, '')", (sid, 2e9)


async def test_a_row_that_sqlite_refuses_is_put_aside_alone(world):
    store = await a_store(world)
    await store.commit(seen("SM1"))
    outcomes = await asyncio.gather(store.commit(seen("SM2")), store.commit(seen("SM1")), store.commit(seen("SM3")), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), cockpit.StoreError, type(None)]
    with pytest.raises(cockpit.StoreError):  # nor is half of it written
        await store.commit(seen("SM0"), seen("SM1"))
    store.note(seen("SM1"))  # nobody waits for it: it is told in the log, and not tried again
    await store.commit(seen("SM4"))
    assert not is_writing(store) and not store.trouble
    await store.close()
    assert [sid for sid, in world.rows("SELECT sid FROM seen ORDER BY sid")] == ["SM1", "SM2", "SM3", "SM4"]


async def test_a_sid_is_taken_once_and_answered_as_the_first_time(world):
    store = await a_store(world)
    firsts = await asyncio.gather(*(store.commit_once("SM1", 2e9, "the reply", seen(f"SM{n}")) for n in (2, 3)))
    assert firsts == [None, "the reply"]
    assert await store.known(["SM1", "SM2", "SM3"]) == {"SM1", "SM2"}
    await store.close()


async def test_what_no_database_can_hold_is_made_storable(world):
    store = await a_store(world)
    await store.commit(("INSERT INTO marks VALUES (?, ?)", ("half a \ud83d pair", 2**70)))
    assert await store.read("SELECT name FROM marks") == [{"name": "half a ? pair"}]
    await store.close()


async def test_a_damaged_database_is_set_aside_and_the_routes_are_kept(world):
    vm = await world.ready()
    await world.text("one")
    await world.hears("ran: one")
    await world.crash()
    for file in world.database.parent.glob("*.db-*"):
        file.unlink()
    world.database.write_bytes(b"no database at all" * 1000)
    await world.start()
    await world.text("two")
    await world.hears("ran: one", "ran: two")
    assert vm.ran == ["one", "two"]
    assert [file.name for file in world.database.parent.glob("*.damaged-*")]


async def test_a_database_with_a_damaged_page_is_set_aside_though_it_opens(world):
    await world.ready()
    await world.text("one")
    await world.hears("ran: one")
    await world.stop()
    content = bytearray(world.database.read_bytes())
    content[4096 * 2:4096 * 3] = b"\xff" * 4096
    world.database.write_bytes(content)
    await world.start()
    assert [file.name for file in world.database.parent.glob("*.damaged-*")]
    await world.text("two")
    await world.hears("ran: one", "ran: two")


async def test_a_database_of_a_newer_version_is_left_alone(world):
    await world.start()
    await world.stop()
    with contextlib.closing(sqlite3.connect(world.database)) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(cockpit.StoreError, match="newer"):
        await world.start()
    world.server = None
    assert world.rows("PRAGMA user_version") == [(7,)]


async def test_files_of_state_are_for_their_owner_alone(world):
    await world.ready()
    await world.text("hello")
    await world.hears("ran: hello")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in world.file.parent.iterdir()}
    assert "routes.json.db" in modes
    assert set(modes.values()) == {0o600}, modes


async def test_sids_are_remembered_for_48_hours(world):
    vm = await world.ready()
    sid = "SM" + "7" * 32
    await world.text("once", MessageSid=sid)
    await world.hears("ran: once")
    await world.clock.advance(47 * 3600)
    await world.text("once", MessageSid=sid)
    await world.text("another")
    await world.hears("ran: once", "ran: another")
    await world.clock.advance(2 * 3600)
    await world.text("a third")
    await world.hears("ran: once", "ran: another", "ran: a third")
    assert (sid,) not in world.rows("SELECT sid FROM seen")
    assert vm.ran == ["once", "another", "a third"]


async def test_what_the_first_version_left_in_flight_goes_on(world):
    vm = await world.ready()
    await world.clock.advance(5)
    await world.stop()
    world.database.unlink()
    now, sids = world.clock.now(), [f"SM{n}" + "0" * 31 for n in range(8)]
    records = [
        {"k": "state", "seen": [[sids[4], now - 60]], "muted": {"whatsapp:" + vm.app: True}},
        {"k": "in", "sid": sids[0], "vm": vm.app, "at": now - 5, "body": "answered"},
        {"k": "in", "sid": sids[1], "vm": vm.app, "at": now - 4, "body": "handed over", "run": True},
        {"k": "in", "sid": sids[2], "vm": vm.app, "at": now - 3, "body": "waiting"},
        {"k": "out", "id": sids[0], "vm": vm.app, "at": now - 2, "parts": ["ran: answered"], "re": [sids[0]]},
        {"k": "out", "id": sids[5], "vm": vm.app, "at": now - 1.5, "parts": ["sent before", "sent after"]},
        {"k": "sent", "id": sids[5], "n": 1},
        {"k": "out", "id": sids[6], "vm": vm.app, "at": now - 1, "parts": ["sent whole"]},
        {"k": "sent", "id": sids[6], "n": 1},
        {"k": "out", "id": sids[7], "vm": vm.app, "at": now - 1, "parts": ["done with"]},
        {"k": "done", "id": sids[7]},
    ]
    journal = world.file.with_name("routes.json.journal")
    journal.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"k": "in", "sid"')
    await world.start()
    await world.text("handed over", MessageSid=sids[1])
    await world.text("seen long ago", MessageSid=sids[4])
    await world.clock.until(lambda: len(world.twilio.sent) == 4)
    await world.restart()
    await world.clock.advance(60)
    assert world.twilio.sent_to(ANN) == ["ran: answered", "sent after", "ran: handed over", "ran: waiting"]
    assert not world.rows("SELECT id FROM outbound")
    assert [json.loads(record)["opted_out"] for record, in world.rows("SELECT record FROM vms")] == [{"whatsapp:": True}]
    assert vm.ran == ["handed over", "waiting"]
    assert world.twilio.count("list"), "what may have been sent is looked up first"
    assert not journal.exists()


async def test_a_database_removed_under_a_running_gateway_takes_no_text_in(world):
    vm = await world.ready()
    await world.text("one")
    await world.hears("ran: one")
    world.database.unlink()
    answer = await world.twilio.texts(ANN, "two")
    assert (answer.status, answer.body["code"]) == (503, "storage")
    assert "disk" in (await world.call("GET", "/health", key=None)).body["troubles"]
    assert vm.ran == ["one"]


# --- Fly, as it is asked ---

async def test_a_provisioning_asks_fly_in_order_and_once_each(world):
    await world.ready()
    asked = [seen.name for seen in world.fly.seen if seen.name in ("create_app", "set_secrets", "allocate_ip", "create_machine", "wait_machine")]
    assert asked == ["create_app", "set_secrets", "allocate_ip", "create_machine", "wait_machine"]


async def test_the_machine_is_the_one_the_contract_describes(world):
    vm = await world.ready(VM_CPUS=2, VM_MEMORY_MB=1024)
    app, machine = world.fly.apps[vm.app], world.fly.machines[0]
    config, seen = machine.config, world.fly.calls("create_machine")[0].body
    assert app.network == vm.app and seen["min_secrets_version"] == app.version and seen["region"] == "iad"
    assert config["image"] == "vm-image:7" and config["guest"] == {"cpu_kind": "shared", "cpus": 2, "memory_mb": 1024}
    assert config["restart"]["policy"] == "always" and config["rootfs"]["persist"] == "restart"
    service, = config["services"]
    assert (service["internal_port"], service["autostart"], service["autostop"]) == (3000, True, "off") and not service.get("checks")
    port, = service["ports"]
    assert (port["port"], port["handlers"]) == (3000, ["http"]) and port["http_options"]["idle_timeout"] > 330 and not port.get("force_https")
    check, = config["checks"].values()
    assert (check["path"], check["port"], check.get("kind", "informational")) == ("/health", 3000, "informational")
    metadata = dict(config["metadata"])
    assert metadata.pop("cockpit_launch")
    assert metadata == stamp(vm.app, ANN, world.saved["gateway_id"])
    assert GITHUB not in json.dumps(config) and ANTHROPIC not in json.dumps(config), "credentials are secrets, not configuration"


async def test_the_vm_s_secrets_are_set_in_one_call(world):
    vm = await world.ready()
    token = base64.urlsafe_b64encode(hmac.new(SECRET.encode(), f"vm:{vm.app}".encode(), hashlib.sha256).digest()).decode().rstrip("=")
    assert world.fly.count("set_secrets") == 1
    assert {name: value.rstrip("=") for name, value in vm.env.items()} == {
        "GITHUB_TOKEN": GITHUB, "ANTHROPIC_API_KEY": ANTHROPIC, "COCKPIT_URL": PUBLIC, "COCKPIT_TOKEN": f"{vm.app}.{token}"}


@pytest.mark.parametrize("changes, asked", [
    ({}, [{"type": "private_v6"}]), ({"FLY_NETWORK": "gateway-net"}, [{"type": "private_v6", "network": "gateway-net"}]),
    ({"VM_NETWORK": "public"}, [{"type": "shared_v4"}, {"type": "v6"}])])
async def test_addresses_are_private_unless_asked_otherwise(world, changes, asked):
    vm = await world.ready(**changes)
    bodies = [{name: value for name, value in seen.body.items() if name != "org_slug" or seen.body["type"] != "private_v6"}
              for seen in world.fly.calls("allocate_ip")]
    assert sorted(bodies, key=str) == sorted(asked, key=str)
    assert len(world.fly.apps[vm.app].ips) == len(asked)
    if changes.get("VM_NETWORK") == "public":
        ports = world.fly.machines[0].config["services"][0]["ports"]
        assert [(port["port"], port["handlers"]) for port in ports if "tls" in port["handlers"]] == [(443, ["tls", "http"])]


async def test_an_address_is_not_allocated_again_because_the_next_is_asked_for_too_early(world):
    await world.start(VM_NETWORK="public")
    gate, job = await world.begin(world.fly, "allocate_ip", after=True)
    world.fly.fails("allocate_ip", 404)
    gate.open()
    await world.clock.run(job)
    assert [address["ip"].count(":") > 0 for app in world.fly.apps.values() for address in app.ips] == [False, True]


@pytest.mark.parametrize("changes, url", [
    ({"VM_NETWORK": "private"}, "http://{app}.flycast:3000"), ({"VM_NETWORK": "public"}, "https://{app}.fly.dev"),
    ({"VM_URL": "http://proxy.example.com/base/{region}/{machine_id}/{app}/"}, "http://proxy.example.com/base/{region}/{machine_id}/{app}")])
async def test_a_vm_s_address_follows_the_template(world, changes, url):
    if "VM_URL" not in changes:
        del world.environ["VM_URL"]
    await world.start(**changes)
    gate, job = await world.begin(world.fly, "wait_machine", after=True)
    route, machine = world.saved["routes"][ANN], world.fly.machines[0]
    assert route["vm_url"].rstrip("/") == url.format(app=machine.app, machine_id=machine.id, region="iad")
    await world.call("DELETE", f"/provision/{route['vm_id']}")
    gate.open()
    assert (await world.clock.run(job)).status == 409


async def test_a_fresh_app_is_seen_at_once_because_the_cookie_comes_back(world):
    """Fly hides a fresh app for a moment from who does not return its affinity cookie; limits are 1 request/s, burst 3."""
    world.fly.boot_s = 3.0
    await world.start()
    before = world.clock.elapsed
    await world.sign_up()
    assert world.clock.elapsed - before <= 3.0 + 1.0


async def test_five_users_at_once_lose_only_what_fly_s_limit_on_app_creation_costs(world):
    world.fly.boot_s = 3.0
    await world.start()
    before = world.clock.elapsed
    answers = await world.clock.run(asyncio.gather(*(world.ask("POST", "/provision", json=sign_up_form(phone)) for phone in PHONES[:5])))
    assert [answer.status for answer in answers] == [201] * 5
    assert world.clock.elapsed - before <= 3.0 + 1.0 + 2.0


@pytest.mark.parametrize("call", ["create_app", "set_secrets", "allocate_ip", "create_machine"])
@pytest.mark.parametrize("status", [400, 403, 412])
async def test_another_4xx_fails_at_once_with_fly_s_words_and_is_undone(world, call, status):
    await world.start()
    world.fly.fails(call, status, times=99, body={"error": "invalid_argument: the moon is wrong"}, headers={"fly-request-id": "req-1"})
    answer = await world.provision()
    assert (answer.status, answer.body["code"]) == (502, "fly_rejected")
    assert "the moon is wrong" in answer.text and world.fly.count(call) == 1
    await world.clock.until(lambda: not world.fly.everything and not world.saved["undo"])
    assert ANN not in world.saved["routes"]


async def test_what_is_no_json_from_fly_is_told_without_harm(world):
    await world.start()
    world.fly.fails("set_secrets", 400, body="<html>nginx</html>")
    assert (await world.provision()).body["code"] == "fly_rejected"


@pytest.mark.parametrize("answer", [lambda echo: {"error": f"no good: {echo}"}, lambda echo: [f"{'x' * 480}{echo}"], json.dumps, lambda echo: {"error": {"echo": echo}}],
                         ids=["in words", "cut in two", "quoted", "nested"])
async def test_a_secret_that_fly_echoes_is_told_to_nobody(world, answer):
    await world.start()
    secret, longer = 'sk-"quoted"-' + "é" * 20, "sk-one-that-another-starts-with"
    world.fly.fails("set_secrets", 400, body=answer(f"{longer}-and-more {secret} {FLY_TOKEN.split(',')[1]}"))
    told = await world.provision(github_token=longer, api_keys={"A": longer + "-and-more", "B": secret})
    for part in ("quoted", "one-that", "and-more", "fm2_discharge"):
        assert part not in told.text and part not in (await world.call("GET", f"/provision/{told.body['vm_id']}")).text


@pytest.mark.parametrize("told", ["1e999", "-5", "soon", "Mon, 01 Jan 2024 00:00:00 +99999999999999999", "Mon, 01 Jan 99999 00:00:00 GMT"])
async def test_a_senseless_retry_after_does_no_harm(world, told):
    await world.start()
    world.fly.fails("create_app", 429, headers={"Retry-After": told})
    await world.sign_up()


async def test_a_lasting_outage_of_fly_is_told_as_such(world):
    await world.start(PROVISION_TIMEOUT_S=60)
    world.fly.fails("create_machine", 503, times=10_000)
    answer = await world.provision()
    assert (answer.status, answer.body["code"]) == (503, "fly_unavailable") and int(answer.headers["Retry-After"]) > 0
    world.fly.heals("create_machine")
    await world.clock.until(lambda: not world.fly.everything)


# --- Twilio ---

# (id, accepted, URL, form, signature presented, the right one if another, token, algorithm), from the official validator. A form is what differs from BASE
# (None: left out), or wire text, or the bytes of a JSON webhook. Addresses without a scheme are https://gw.example.com.
Y, N, T, S, J = True, False, "0123456789abcdef0123456789abcdef", "vdcdhavOFIUp4hloIOAn21bf5Z4=", "FPjMEp9ipaO+Zo0izMkyvIo9TuM="
SM, MM, AC = "SM" + "b" * 32, "MM" + "c" * 32, "AC" + "a" * 32
MEDIA = f"https://api.twilio.com/2010-04-01/Accounts/{AC}/Messages/{MM}/Media/ME"
STATUS = f"SmsSid={SM}&To=%2B15558675310&MessageSid={SM}&AccountSid={AC}&From=%2B15557122661&ApiVersion=2010-04-01"
JSON, SHA = b'{"CallSid":"CA1234567890ABCDE","Caller":"+12349013030"}', "5ccde7145dfb8f56479710896586cb9d5911809d83afbe34627818790db0aec9"
BASE = {
    "ToCountry": "US", "ToState": "CA", "SmsMessageSid": SM, "NumMedia": "0", "ToCity": "SAN BRUNO", "FromZip": "94103", "SmsSid": SM, "FromState": "CA",
    "SmsStatus": "received", "FromCity": "SAN FRANCISCO", "Body": "Hello gateway", "FromCountry": "US", "To": "+15557122661", "ToZip": "94030",
    "NumSegments": "1", "MessageSid": SM, "AccountSid": AC, "From": "+15558675310", "ApiVersion": "2010-04-01"}
VECTORS = [
    ("doc-example", Y, "https://example.com/myapp.php?foo=1&bar=2",
     "Digits=1234&To=%2B18005551212&From=%2B14158675310&Caller=%2B14158675310&CallSid=CA1234567890ABCDE", "L/OH5YylLD5NRKLltdqwSvS0BnU=", None, "12345"),
    ("sms-basic", Y, "/sms", {}, S),
    ("sms-shuffled-arrival", Y, "/sms", {}, S),
    ("case-sensitive-sort", Y, "/sms", "alpha=2&Zeta=1&Beta=3", "cssBBhvjjQiv4/4y1h24k37qmyU="),
    ("case-insensitive-sort-wrong", N, "/sms", "alpha=2&Zeta=1&Beta=3", "JzhsalNkYjfwv+VtiMyO1W/cmAU=", "cssBBhvjjQiv4/4y1h24k37qmyU="),
    ("lexicographic-not-natural", Y, "/sms", "&".join(f"MediaUrl{n}=https://api.twilio.com/m/{n}" for n in range(11)) + "&NumMedia=11",
     "skXGzgBn2s7FoY1L6aZuR4XUYMw="),
    ("empty-params-dict", Y, "/sms", "", "afc16phXBY7x6FqNPcVAJEBJiCs="),
    ("empty-params-none", Y, "/sms", "", "afc16phXBY7x6FqNPcVAJEBJiCs="),
    ("get-request-all-in-query", Y, "/sms?ApiVersion=2010-04-01&Body=hi%20there&From=%2B15558675310&MessageSid=" + SM, "", "Oae2pwjcmeK2RZ+ywN5mY21Fd/I="),
    ("get-params-passed-twice-wrong", N, "/sms?Body=hi&From=%2B15558675310", "Body=hi&From=%2B15558675310", "6QYarVGcz+uplz8cC3rTHRWr+io=",
     "1TkY20L0BBtIry/8O6y+mJOwYuc="),
    ("multi-value-two", Y, "/sms", {"Tag": ["b", "a"]}, "O8WuS4XKf7Lk8MY0RB8zjOM3mRk="),
    ("multi-value-order-irrelevant", Y, "/sms", {"Tag": ["a", "b"]}, "O8WuS4XKf7Lk8MY0RB8zjOM3mRk="),
    ("multi-value-duplicates-collapse", Y, "/sms", {"Tag": ["a", "a", "b"]}, "O8WuS4XKf7Lk8MY0RB8zjOM3mRk="),
    ("multi-value-first-only-wrong", N, "/sms", {"Tag": "b"}, "O8WuS4XKf7Lk8MY0RB8zjOM3mRk=", "g6LhKGHQvfVeoMPNidRV0By+6ZI="),
    ("multi-value-joined-wrong", N, "/sms", {"Tag": "a,b"}, "O8WuS4XKf7Lk8MY0RB8zjOM3mRk=", "wpkiLmzEsKBztycu2ELoHNIWcJs="),
    ("multi-value-with-empty", Y, "/sms", {"Tag": ["", "x"]}, "2B6UI/EooC7OoENWURW7g7dOAT4="),
    ("unicode-accents", Y, "/sms", {"Body": "Café à la crème, señor – “quoted”"}, "Q1dIJwa0FtCqy0nuZrlzqnijnmo="),
    ("unicode-emoji", Y, "/sms", {"Body": "👍 👨\u200d👩\u200d👧\u200d👦 🇮🇪 ok"}, "NK/+WUBn+Co07icCrFu2TFe5r1E="),
    ("unicode-cjk-rtl", Y, "/sms", {"Body": "你好 مرحبا שלום"}, "bZcBcROSMBqMcP5QteWxDKHNHY8="),
    ("unicode-nfc-vs-nfd-wrong", N, "/sms", {"Body": "Cafe\u0301"}, "sZQsYUW9u8cb2bTUk6Ir49UNBL0=", "evoIr2HvAy+Zu9QlHkBtNH4KWuk="),
    ("unicode-replaced-wrong", N, "/sms", {"Body": "CafÃ©"}, "sZQsYUW9u8cb2bTUk6Ir49UNBL0=", "XBJWzXtkYiWFYBPXONHUdm7cO4M="),
    ("unicode-param-name", Y, "/sms", {"Éxtra": "1"}, "9xE1cCAsJP8owl/xMEqQ5G6Rx1k="),
    ("plus-decoded", Y, "/sms", "From=%2B15558675310&To=%2B15557122661&Body=1%2B1%3D2", "7JTpCPYmPXawU2aefRkMmcIVG7E="),
    ("plus-as-space-wrong", N, "/sms", "From=+15558675310&To=%2B15557122661&Body=1%2B1%3D2", "7JTpCPYmPXawU2aefRkMmcIVG7E=", "34GmYME+Ssj7FRiLxwm8wSuAV68="),
    ("plus-left-encoded-wrong", N, "/sms", "From=%252B15558675310&To=%2B15557122661&Body=1%2B1%3D2", "7JTpCPYmPXawU2aefRkMmcIVG7E=",
     "LEQ1J3j1HJQTXtGgUVfdHI/r/4A="),
    ("whatsapp-addresses", Y, "/sms", {"To": "whatsapp:+15557122661", "From": "whatsapp:+15558675310", "ProfileName": "Zoë 🌱", "WaId": "15558675310",
     "ReferralNumMedia": "0", "MessageType": "text"}, "XzUHEEGP0sgxKEpJX4UlTzwv7Uw="),
    ("empty-body", Y, "/sms", {"Body": ""}, "oZ1hl14zrDwWOQZFrp12uEsUMr8="),
    ("empty-body-dropped-wrong", N, "/sms", {"Body": None}, "oZ1hl14zrDwWOQZFrp12uEsUMr8=", "BfRfuQl8WUraFppbsj/2kHDWr/k="),
    ("empty-geo-fields", Y, "/sms", {"FromZip": "", "FromState": "", "FromCity": ""}, "Wc6aLBE/770nhbrS0pId48xUqYA="),
    ("body-newline-lf", Y, "/sms", {"Body": "line one\nline two"}, "BVwyByKjTx/9+t7AuFIxi2pNTl4="),
    ("body-newline-crlf", Y, "/sms", {"Body": "line one\r\nline two"}, "6YCACYXUhketIw/VFpfuZB2zAFg="),
    ("body-newline-normalised-wrong", N, "/sms", {"Body": "line one\nline two"}, "6YCACYXUhketIw/VFpfuZB2zAFg=", "BVwyByKjTx/9+t7AuFIxi2pNTl4="),
    ("body-leading-trailing-space", Y, "/sms", {"Body": "  hi \t"}, "EyfXAwDbGT9SbsgqFOjrsqQETo4="),
    ("body-trimmed-wrong", N, "/sms", {"Body": "hi"}, "EyfXAwDbGT9SbsgqFOjrsqQETo4=", "Q7p5wIv/nd96oKBM/BA/k9gxWrU="),
    ("body-special-characters", Y, "/sms", {"Body": "a&b=c%20#d?e<f>\"g\"'h'"}, "THZvEG7kvkGGldcev9ZcvVPVvUo="),
    ("body-1600", Y, "/sms", {"Body": "x" * 1600, "NumSegments": "11"}, "p+w4zxpi9wqjjQkqgeK4IJhwCGE="),
    ("mms-inbound", Y, "/sms", {"SmsMessageSid": MM, "NumMedia": "2", "SmsSid": MM, "Body": "", "MessageSid": MM, "MediaContentType0": "image/jpeg",
     "MediaUrl0": MEDIA + "e" * 32, "MediaContentType1": "image/png", "MediaUrl1": MEDIA + "f" * 32}, "1IjjEzjcpKv45QAytT8LBuzM0rE="),
    ("messaging-service-optout", Y, "/sms", {"Body": "STOP", "OptOutType": "STOP", "MessagingServiceSid": "MGdddddddddddddddddddddddddddddddd"},
     "XD2mZusxcJtyN1xEmZ8Igi3Gcpk="),
    ("status-callback-delivered", Y, "/sms/status?job=42", STATUS + "&SmsStatus=delivered&MessageStatus=delivered&RawDlrDoneDate=2611220931",
     "K3HLdJYeR48wt2QbAJTamY9xR7E="),
    ("status-callback-failed", Y, "/sms/status?job=42", STATUS + "&SmsStatus=undelivered&MessageStatus=undelivered&ErrorCode=30003",
     "6jsr6HZonLWMgxezVIz5RGfHxmM="),
    ("unknown-new-parameter", Y, "/sms", {"BrandNewTwilioField": "1"}, "H2jZU6kNHfHl9Qoy466Y3MlWLKM="),
    ("unknown-parameter-ignored-wrong", N, "/sms", {}, "H2jZU6kNHfHl9Qoy466Y3MlWLKM=", S),
    ("query-string", Y, "/sms?tenant=acme&lang=en", {}, "AlBu8GZn+rauCIW7HqA1A3dOJGY="),
    ("query-reordered-wrong", N, "/sms?lang=en&tenant=acme", {}, "AlBu8GZn+rauCIW7HqA1A3dOJGY=", "MSNMy78MRJ5L8iFk8J+5LyDAmLs="),
    ("query-dropped-wrong", N, "/sms", {}, "AlBu8GZn+rauCIW7HqA1A3dOJGY=", S),
    ("query-encoded-kept", Y, "/sms?message=hello%20world&type=test%2Bvalue", {}, "wYgjsj/WBpINH6bzbdKsdBoelTc="),
    ("query-decoded-wrong", N, "/sms?message=hello world&type=test+value", {}, "wYgjsj/WBpINH6bzbdKsdBoelTc=", "9B1J3EoaoOTMES9ygu5aQVVfi/c="),
    ("query-reencoded-wrong", N, "/sms?message=hello+world&type=test%2Bvalue", {}, "wYgjsj/WBpINH6bzbdKsdBoelTc=", "6pjLM4Wy+XfYXY/I6Zpg3reMnoc="),
    ("query-hex-case-wrong", N, "/sms?t=a%2bb", {}, "CFFsnAq0auTRW+oZ9XtgY2mvZo8=", "ipZQLgFTt29ZnruQQw288HWe/xY="),
    ("query-same-name-as-form", Y, "/sms?From=x", {}, "bZOIFG6SPNsbVJTvbp3je4klfOA="),
    ("port-443-in-url-signed-without", Y, "https://gw.example.com:443/sms", {}, S, "O+0kT7coSS1ojD4AEOfBO9SJRMI="),
    ("port-absent-signed-with-443", Y, "/sms", {}, "O+0kT7coSS1ojD4AEOfBO9SJRMI=", S),
    ("port-8443-signed-with", Y, "https://gw.example.com:8443/sms", {}, "UPkIThbtC/cCeUWzBZRb/pDsAtU="),
    ("port-8443-signed-without", Y, "https://gw.example.com:8443/sms", {}, S, "UPkIThbtC/cCeUWzBZRb/pDsAtU="),
    ("port-8443-missing-wrong", N, "/sms", {}, "UPkIThbtC/cCeUWzBZRb/pDsAtU=", S),
    ("port-http-80", Y, "http://gw.example.com/sms", {}, "xAlqylGwrulQVmVH+ZoGYmW2HsU=", "T1ybxo1yMO2xHnH8t8AM7zm9Fro="),
    ("port-wrong-default", N, "/sms", {}, "M3hIZanHixQ/YmQExAGxQS82mM4=", S),
    ("port-with-query", Y, "https://gw.example.com:443/sms?tenant=acme", {}, "4fvWnzNOrTNvukv87xJc1xcL1uE=", "8SljwQbhV70Y1JhcbUonj1crBYs="),
    ("scheme-http-vs-https-wrong", N, "http://gw.example.com/sms", {}, S, "T1ybxo1yMO2xHnH8t8AM7zm9Fro="),
    ("scheme-http", Y, "http://gw.example.com/sms", {}, "T1ybxo1yMO2xHnH8t8AM7zm9Fro="),
    ("internal-host-wrong", N, "http://10.0.0.5:8080/sms", {}, S, "61yxmQ6nfUNyIubMf0NVs6gyJs0="),
    ("host-case-wrong", N, "https://GW.example.com/sms", {}, S, "HLxc4aI+N7gvizAOvNRd0UFNkpE="),
    ("path-case-wrong", N, "/SMS", {}, S, "7+YZzc288q/C3JMmWYfVoOTfPEU="),
    ("trailing-slash-added-wrong", N, "/sms/", {}, S, "/SDcUiGETIMvH0WSiVkAc54IPj4="),
    ("trailing-slash-removed-wrong", N, "/sms", {}, "/SDcUiGETIMvH0WSiVkAc54IPj4=", S),
    ("trailing-slash-kept", Y, "/sms/", {}, "/SDcUiGETIMvH0WSiVkAc54IPj4="),
    ("root-path", Y, "/", {}, "C5zMdHeo5gZKWDhxRobt4bAGxpU="),
    ("root-without-slash-wrong", N, "https://gw.example.com", {}, "C5zMdHeo5gZKWDhxRobt4bAGxpU=", "A2cpHB2oYUAgCtlh3FbmR33AbH0="),
    ("path-percent-encoding-wrong", N, "/~user/sms", {}, "N659+exmMGepoi8oEecnceNvpZg=", "5W4AEQjmV0sP03EUPLohXbaNTT8="),
    ("path-prefix-stripped-wrong", N, "/sms", {}, "GXM6SrRQrJvniHopEJ/JRBJypPM=", S),
    ("fragment-stripped", Y, "/sms", {}, S),
    ("userinfo-stripped", Y, "/sms", {}, S),
    ("wrong-token", N, "/sms", {}, "qkVX0mHqZIVx5pqN/zd9UnNkJgg=", S),
    ("secondary-token-wrong", N, "/sms", {}, S, "qkVX0mHqZIVx5pqN/zd9UnNkJgg=", "fedcba9876543210fedcba9876543210"),
    ("token-case-wrong", N, "/sms", {}, S, "PsNubpZTgHjMfRIA/Mr1zvXW9H0=", "0123456789ABCDEF0123456789ABCDEF"),
    ("token-trailing-newline-wrong", N, "/sms", {}, S, "6xCMIVc4sTLf7gb6bMVcWmYKg5o=", "0123456789abcdef0123456789abcdef\n"),
    ("tampered-body", N, "/sms", {"Body": "send me money"}, S, "g8IT5lB6XDJlXrwcgtg5zxM7Dh8="),
    ("tampered-from", N, "/sms", {"From": "+15550001111"}, S, "TpxdKBVbDIeR6owGknZkzI54bAM="),
    ("missing-param", N, "/sms", {"AccountSid": None}, S, "bS+x7ep59LH7veqBP2dwnOz9EEw="),
    ("extra-param", N, "/sms", {"Admin": "1"}, S, "1NP2TktRS4yqI+zJnpT/Vo5r5gw="),
    ("renamed-param", N, "/sms", {"body": "Hello gateway", "Body": None}, S, "8yrVhNM+KE9jNCpzx7EkUmePOVQ="),
    ("boundary-shift", Y, "/sms", "A=BC", "b/enR4arsrrnPqvti8N7mU83G5s="),
    ("signature-lower-cased", N, "/sms", {}, "vdcdhavofiup4hloioan21bf5z4=", S),
    ("signature-upper-cased", N, "/sms", {}, "VDCDHAVOFIUP4HLOIOAN21BF5Z4=", S),
    ("signature-empty", N, "/sms", {}, "", S),
    ("signature-no-padding", N, "/sms", {}, "vdcdhavOFIUp4hloIOAn21bf5Z4", S),
    ("signature-trailing-space", N, "/sms", {}, "vdcdhavOFIUp4hloIOAn21bf5Z4= ", S),
    ("signature-hex", N, "/sms", {}, "bdd71d85abce148529e2196820e027db56dfe59e", S),
    ("signature-sha256-wrong-algorithm", N, "/sms", {}, "vcebjY5yqqx+1J2+89zsRS2ruS7gt2sXpTUEXNIjCw8=", S),
    ("signature-with-plus-and-slash", Y, "/sms", {"Body": "find a signature with + and / 4"}, "JdRFr+QyDkSqBjG2U662wjO/p0k="),
    ("signature-urlsafe", N, "/sms", {"Body": "find a signature with + and / 4"}, "JdRFr-QyDkSqBjG2U662wjO_p0k=", "JdRFr+QyDkSqBjG2U662wjO/p0k="),
    ("signature-garbage", N, "/sms", {}, "not-a-signature", S),
    ("json-valid", Y, "/events?bodySHA256=" + SHA, JSON, J),
    ("json-valid-other-query", Y, "/events?foo=1&bodySHA256=" + SHA, JSON, "M3asoCGQ50ByBw1W7UOxfBXPSQQ="),
    ("json-unicode", Y, "/events?bodySHA256=3a86edf29b1457373e378e2c8754001820cd158b64f764be77b795af435695d8",
     '{"Body":"Caf\xe9 \U0001f44d"}'.encode(), "u2jvpEdqlXOmRC1T5RIwXf+v3tQ="),
    ("json-body-tampered", N, "/events?bodySHA256=" + SHA, b'{"CallSid":"CA1234567890ABCDE","Caller":"+12349013031"}', J),
    ("json-reserialised-wrong", N, "/events?bodySHA256=" + SHA, b'{"CallSid": "CA1234567890ABCDE", "Caller": "+12349013030"}', J),
    ("json-hash-tampered", N, "/events?bodySHA256=5041bf1f713df204784353e82f6a4a535931cb64f1f4b4a5aeaffcb720918b22", b'{"x":1}', J,
     "nGp9e/zViT8O1hIR2dWLHBWxVQo="),
    ("json-empty-body", Y, "/events?bodySHA256=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", b"", "m0qKiKcC1MoJFNMqsboYBjJ/S00="),
    ("json-port-443", Y, "https://gw.example.com:443/events?bodySHA256=" + SHA, JSON, J, "Cs9icmF0Aoye0HCysLlKLnAAtLs="),
    ("json-wrong-token", N, "/events?bodySHA256=" + SHA, JSON, "wYSBNpI6H2vwerxXjPoESFZZ4+0=", J),
    ("sharedkey-sha256", Y, "/sms", {}, "ERKUTp7e1q/wa8WmzpqOKdVW2kMnnMOZ3omGg+H7bUs=", None, "made-up-shared-key-secret", "HMAC_SHA256"),
    ("sharedkey-sha1-presented", N, "/sms", {}, "6nTPppU+6UufLDcxdG3rLM8/fVs=", "ERKUTp7e1q/wa8WmzpqOKdVW2kMnnMOZ3omGg+H7bUs=",
     "made-up-shared-key-secret", "HMAC_SHA256"),
    ("sharedkey-account-token-wrong", N, "/sms", {}, "ERKUTp7e1q/wa8WmzpqOKdVW2kMnnMOZ3omGg+H7bUs=", "vcebjY5yqqx+1J2+89zsRS2ruS7gt2sXpTUEXNIjCw8=",
     T, "HMAC_SHA256"),
]


def form_of(shape: dict | str) -> list[tuple[str, str]]:
    if isinstance(shape, str):
        return parse_qsl(shape, keep_blank_values=True)
    return [(name, value) for name, values in (BASE | shape).items() if values is not None for value in (values if isinstance(values, list) else [values])]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector[0])
def test_signatures_are_decided_as_twilio_s_own_validator_decides(vector):
    _, accepted, url, form, presented, expected, token, algorithm = (*vector, None, None, None)[:8]
    url, token, algorithm = url if "://" in url else "https://gw.example.com" + url, token or T, algorithm or "HMAC_SHA1"
    pairs, body = ([], form) if isinstance(form, bytes) else (form_of(form), None)
    assert cockpit.twilio_signature(token, url, pairs, algorithm) == (presented if expected is None else expected)
    assert cockpit.is_signed(token, url, pairs, presented, body=body, algorithm=algorithm) is accepted
    assert cockpit.is_signed(token, url, pairs[::-1], presented, body=body, algorithm=algorithm) is accepted, "the order of arrival does not matter"


@pytest.mark.parametrize("header", [None, "", "é", "a" * 10_000])
def test_a_missing_or_senseless_signature_is_no_signature(header):
    assert not cockpit.is_signed(T, "https://gw.example.com/sms", form_of({}), header)


def test_an_empty_twiml_answer_says_nothing():
    assert cockpit.twiml().startswith('<?xml version="1.0" encoding="UTF-8"?>')
    root = ElementTree.fromstring(cockpit.twiml().encode())
    assert root.tag == "Response" and not len(root) and not root.text


@pytest.mark.parametrize("text", ["plain", "a < b & c > d \"e\" 'f'", "two\nlines\tand a tab", "👍 ñ", "]]>"])
def test_twiml_carries_any_text(text):
    root = ElementTree.fromstring(cockpit.twiml(text).encode())
    assert root.tag == "Response" and [child.tag for child in root] == ["Message"] and "".join(root.itertext()) == text


def test_twiml_leaves_out_what_xml_cannot_carry():
    assert "".join(ElementTree.fromstring(cockpit.twiml("a\x00b\x1bc\ufffed").encode()).itertext()).startswith("ab")


def test_text_for_a_phone_has_no_control_characters_and_is_valid_utf8():
    text = cockpit.clean_text("\x1b[31mred\x1b[0m\r\nbell\x07 nul\x00 half\ud83d emoji👍\ttab")
    text.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text) and "red" in text and "emoji👍" in text and "[31m" not in text


def units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


@pytest.mark.parametrize("text", ["short", "x" * 1600, "👍" * 800])
def test_what_fits_in_one_text_is_sent_as_it_is(text):
    assert cockpit.split_text(text) == [text]


@pytest.mark.parametrize("text, parts", [("x" * 1601, 2), ("👍" * 801, 2), ("word " * 860, 3), ("y" * 4300, 3)])
def test_longer_text_is_numbered_parts_of_at_most_1600_units(text, parts):
    split = cockpit.split_text(text)
    assert len(split) == parts and all(units(part) <= 1600 for part in split)
    assert [part[:6] for part in split] == [f"({n}/{parts}) " for n in range(1, parts + 1)]
    assert "".join(part[6:] for part in split).replace(" ", "") == text.replace(" ", "")
    "".join(split).encode("utf-8")  # no emoji is cut in two


def test_parts_end_at_line_ends_else_at_word_ends():
    lines = [f"line {n:03d} " + "z" * 60 for n in range(60)]
    told = [line for part in cockpit.split_text("\n".join(lines)) for line in part[6:].strip("\n").split("\n")]
    assert told == lines
    words = [f"word{n:04d}" for n in range(500)]
    assert [word for part in cockpit.split_text(" ".join(words)) for word in part[6:].split()] == words


def test_a_flood_is_eight_parts_and_says_what_it_left_out():
    split = cockpit.split_text("x" * 100_000)
    left_out = re.search(r"\[(\d+) characters left out\]$", split[-1])
    assert len(split) == 8 and all(units(part) <= 1600 for part in split)
    assert sum(part.count("x") for part in split) + int(left_out[1]) == 100_000


# --- Provisioning ---

RECORD = {"vm_id", "machine_id", "vm_url", "phone_number", "region", "image", "state", "step", "created_at", "last_error"}


async def test_a_sign_up_is_answered_with_the_vm_record(world):
    await world.start()
    answer = await world.provision("+1 (555) 123-4567")
    record = answer.body
    assert answer.status == 201 and set(record) >= RECORD and answer.headers["Location"].endswith(f"/provision/{record['vm_id']}")
    assert re.fullmatch(r"cockpit-vm-[a-z2-7]{8}", record["vm_id"]) and record["vm_id"] in world.fly.apps
    assert (record["state"], record["phone_number"], record["region"], record["image"]) == ("ready", ANN, "iad", "vm-image:7")
    assert record["machine_id"] == world.fly.machines[0].id and not record["last_error"]
    for id in (record["vm_id"], record["machine_id"]):
        found = await world.call("GET", f"/provision/{id}")
        assert found.status == 200 and {name: found.body[name] for name in RECORD} == {name: record[name] for name in RECORD}
    assert [vm["vm_id"] for vm in (await world.call("GET", "/provision")).body["vms"]] == [record["vm_id"]]


async def test_a_sign_up_may_choose_its_region(world):
    await world.start()
    assert (await world.provision(region="ams")).body["region"] == "ams"


async def test_a_vm_is_answered_for_only_when_it_is_healthy(world):
    await world.start()
    world.vms.fails("health", 503, times=6)
    before = world.clock.elapsed
    await world.sign_up()
    assert world.vms.count("health") == 7 and world.clock.elapsed - before < 30


@pytest.mark.parametrize("call, state", [("create_app", None), ("set_secrets", None), ("wait_machine", "provisioning")])
async def test_the_intent_and_each_id_are_on_disk_before_the_next_call(world, call, state):
    await world.start()
    gate, job = await world.begin(world.fly, call)
    route = world.saved["routes"][ANN]
    assert route["state"] == "provisioning" and route["vm_id"] == world.fly.calls("create_app")[0].body["name"]
    assert bool(route.get("machine_id")) == (call == "wait_machine")
    seen = await world.call("GET", f"/provision/{route['vm_id']}")
    assert (seen.status, seen.body["state"]) == (200, "provisioning") and seen.body["step"]
    gate.open()
    assert (await world.clock.run(job)).status == 201


async def test_the_same_phone_gets_one_vm_however_often_it_asks(world):
    await world.start()
    answers = await world.clock.run(asyncio.gather(*(world.ask("POST", "/provision", json=sign_up_form()) for _ in range(20))))
    answers.append(await world.provision())
    vm_id, = world.fly.apps
    assert sorted(answer.status for answer in answers) == [201] + [409] * 20
    assert {answer.body["vm_id"] for answer in answers} == {vm_id}
    assert {answer.body["code"] for answer in answers if answer.status == 409} == {"phone_taken"}
    assert len(world.fly.machines) == 1 and world.fly.count("create_app") == 1


@pytest.mark.parametrize("checks, code", [("critical", "vm_unhealthy"), ("passing", "vm_unreachable")])
async def test_a_vm_that_never_answers_is_undone_and_told_apart(world, checks, code):
    await world.start(PROVISION_TIMEOUT_S=20)
    world.vms.drops("health", times=10_000)
    world.fly.checks = checks
    before = world.clock.elapsed
    answer = await world.provision()
    assert (answer.status, answer.body["code"]) == (504, code) and 15 <= world.clock.elapsed - before <= 30
    assert code == "vm_unhealthy" or "VM_NETWORK" in answer.body["detail"] and "FLY_NETWORK" in answer.body["detail"]
    await world.clock.until(lambda: not world.fly.everything)
    assert not world.saved["routes"]


async def test_a_caller_who_hangs_up_does_not_stop_a_provisioning(world):
    await world.start()
    gate, job = await world.begin(world.fly, "create_machine")
    job.cancel()
    gate.open()
    await world.clock.until(lambda: world.saved["routes"][ANN]["state"] == "ready")
    await world.text("hello")
    await world.hears("ran: hello")


async def test_the_caller_s_error_does_not_wait_for_the_undo(world):
    await world.start()
    world.fly.fails("create_machine", 400)
    gate = world.fly.holds("delete_app")
    assert (await world.provision()).status == 502
    vm_id, = world.saved["undo"]
    assert vm_id in world.fly.apps and ANN not in world.saved["routes"]
    again = await world.provision()
    assert again.status == 201 and again.body["vm_id"] != vm_id, "the number is free at once"
    gate.open()
    await world.clock.until(lambda: set(world.fly.everything) == {again.body["vm_id"]})


async def test_a_failed_sign_up_stays_readable_for_an_hour_and_is_not_listed(world):
    await world.start()
    world.fly.fails("create_machine", 400, body={"error": "invalid_argument: the moon is wrong"})
    await world.provision()
    path = "/provision/" + world.fly.calls("create_app")[0].body["name"]
    found = await world.call("GET", path)
    assert found.body["state"] == "failed" and "the moon is wrong" in found.body["last_error"]
    assert (await world.call("GET", "/provision")).body["vms"] == []
    await world.clock.advance(3700)
    assert (await world.call("GET", path)).status == 404


async def test_teardown_leaves_nothing(world):
    vm = await world.ready()
    answer = await world.call("DELETE", f"/provision/{vm.app}")
    assert (answer.status, answer.text) == (204, "")
    assert not world.fly.everything and not world.saved["routes"] and not world.saved["undo"]
    assert [seen.query for seen in world.fly.calls("delete_app")] == [{"force": "true"}]
    for method in ("GET", "DELETE"):
        gone = await world.call(method, f"/provision/{vm.app}")
        assert (gone.status, gone.body["code"]) == (404, "unknown_vm")
    assert "has no cockpit VM yet" in (await world.text("anybody?")).said


async def test_204_waits_until_fly_no_longer_knows_the_app(world):
    world.fly.delete_polls = 4
    vm = await world.ready()
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    assert not world.fly.everything


async def test_an_unconfirmed_teardown_is_202_and_goes_on_until_fly_confirms(world):
    vm = await world.ready()
    world.fly.fails("delete_app", 503, times=10_000)
    before = world.clock.elapsed
    answer = await world.call("DELETE", f"/provision/{vm.app}")
    assert (answer.status, answer.body["vm_id"], answer.body["state"]) == (202, vm.app, "deleting") and 20 <= world.clock.elapsed - before <= 30
    assert vm.app in world.saved["undo"] and ANN not in world.saved["routes"]
    await world.restart()
    for name in (vm.app, answer.body["machine_id"]):
        assert (await world.call("GET", f"/provision/{name}")).body["state"] == "deleting"
    await world.clock.advance(120)
    pauses = [later.at - earlier.at for earlier, later in itertools.pairwise(world.fly.calls("delete_app"))]
    assert max(pauses) <= 75
    world.fly.heals("delete_app")
    await world.clock.until(lambda: not world.fly.everything and not world.saved["undo"])


@pytest.mark.parametrize("call", ["create_app", "set_secrets", "allocate_ip", "create_machine", "wait_machine"])
async def test_teardown_cancels_a_running_provisioning(world, call):
    await world.start()
    gate, job = await world.begin(world.fly, call)
    vm_id = world.saved["routes"][ANN]["vm_id"]
    teardown = asyncio.ensure_future(world.ask("DELETE", f"/provision/{vm_id}"))
    await world.clock.settle()
    gate.open()
    answers = await world.clock.run(asyncio.gather(teardown, job))
    assert [answer.status for answer in answers] == [204, 409] and answers[1].body["code"] == "torn_down"
    await world.clock.advance(5)
    assert not world.fly.everything and not world.saved["routes"]


async def test_who_tears_a_set_up_down_at_the_same_time_is_told_the_same(world):
    await world.start()
    gate, job = await world.begin(world.fly, "create_machine")
    vm_id = world.saved["routes"][ANN]["vm_id"]
    teardowns = asyncio.gather(*(world.ask("DELETE", f"/provision/{vm_id}") for _ in range(3)))
    gate.open()
    assert [answer.status for answer in await world.clock.run(teardowns)] == [204] * 3
    assert (await world.clock.run(job)).body["code"] == "torn_down"
    assert not world.fly.everything and not world.saved["routes"] and not world.saved["undo"]


async def test_a_failure_that_nobody_foresaw_frees_the_number_too(world, monkeypatch):
    await world.start()
    world.fly.fails("create_machine", 503)  # a pause before the next attempt is drawn
    with monkeypatch.context() as patch:
        patch.setattr(world.server.runner.app[cockpit.GATEWAY].clock, "uniform", lambda low, high: 1 / 0)
        assert (await world.provision()).body["code"] == "internal"
    await world.clock.until(lambda: not world.fly.everything and not world.saved["undo"] and not world.saved["routes"])


async def test_teardown_works_while_a_failure_is_looked_into(world):
    await world.start(PROVISION_TIMEOUT_S=20)
    world.vms.drops("health", times=10_000)
    gate, job = await world.begin(world.fly, "get_machine")
    vm_id = world.saved["routes"][ANN]["vm_id"]
    assert (await world.call("DELETE", f"/provision/{vm_id}")).status == 204
    gate.open()
    assert (await world.clock.run(job)).body["code"] == "torn_down"
    assert not world.fly.everything and not world.saved["routes"]


async def test_teardown_works_for_a_vm_that_is_away(world):
    vm = await world.ready()
    vm.away = 503
    await world.text("anybody?")
    await world.hears(RESTARTING)
    assert (await world.call("GET", f"/provision/{vm.app}")).body["state"] in ("away", "ready")
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    assert not world.fly.everything


# --- Relay ---

async def test_a_text_reaches_its_vm_and_the_answer_its_phone(world):
    vm = await world.ready()
    answer = await world.text("hello", MessageSid="SM" + "1" * 32)
    assert (answer.said, answer.headers["Content-Type"].split(";")[0]) == ("", "text/xml")
    await world.hears("ran: hello")
    assert vm.asked == [Command("hello", [], "SM" + "1" * 32, f"Bearer {vm.env['COCKPIT_TOKEN']}")]
    sent = dict(world.twilio.calls("send")[0].body)
    assert (sent["From"], sent["To"], sent["SmartEncoded"]) == (NUMBER, ANN, "true")


@pytest.mark.parametrize("body", ["two\nlines\r\nand more", "👍🏽 ñ 你好", "a&b=c+d%20e", "  leading and trailing  ", "x" * 1600, '"quoted" \\ back', "0"])
async def test_a_text_arrives_unchanged(world, body):
    vm = await world.ready()
    await world.text(body)
    await world.clock.until(lambda: vm.ran)
    assert vm.ran == [body]


async def test_two_users_reach_only_their_own_vms_and_are_answered_on_their_own_phones(world):
    await world.start()
    ann, bob = await world.sign_up(ANN), await world.sign_up(BOB)
    for n in range(5):
        await asyncio.gather(world.text(f"ann {n}", ANN), world.text(f"bob {n}", BOB))
    await world.hears(*(f"ran: ann {n}" for n in range(5)), phone=ANN)
    await world.hears(*(f"ran: bob {n}" for n in range(5)), phone=BOB)
    assert (ann.ran, bob.ran) == ([f"ann {n}" for n in range(5)], [f"bob {n}" for n in range(5)])


async def test_a_slow_vm_holds_up_nobody_else_and_runs_one_text_at_a_time(world):
    await world.start()
    ann, _ = await world.sign_up(ANN), await world.sign_up(BOB)
    gate = ann.holds()
    for body in ("one", "two", "three"):
        await world.text(body)
    await world.clock.until(gate.arrived.is_set)
    await world.text("hi", BOB)
    await world.hears("ran: hi", phone=BOB)
    assert len(ann.asked) == 1, "the next is posted after the answer of the one before"
    gate.open()
    await world.hears("ran: one", "ran: two", "ran: three")


async def test_a_twilio_outage_holds_up_no_command_and_loses_no_answer(world):
    vm = await world.ready()
    world.twilio.fails("send", 503, times=10_000, code=20503)
    for body in ("one", "two", "three"):
        await world.text(body)
    await world.clock.until(lambda: vm.ran == ["one", "two", "three"], within=1)
    await world.clock.advance(300)
    world.twilio.heals("send")
    await world.hears("ran: one", "ran: two", "ran: three")


async def test_an_answer_longer_than_a_text_arrives_in_numbered_parts(world):
    vm = await world.ready()
    vm.answer = lambda text: {"text": "x" * 4300, "images": [], "exitCode": 0, "durationMs": 1}
    await world.text("show me")
    await world.hears(*cockpit.split_text("x" * 4300))


@pytest.mark.parametrize("answer, heard", [
    ({"text": "", "images": [], "exitCode": 0, "durationMs": 1}, "Done, no output."),
    ({"text": " \n", "images": [], "exitCode": 0, "durationMs": 1}, "Done, no output."),
    ({"text": "", "images": [], "exitCode": 3, "durationMs": 1}, "Exit code 3, no output."),
    (b"not json", "Your VM's answer could not be read."), (b"", None),
    (b"[]", "Your VM's answer could not be read."), (b'"text"', "Your VM's answer could not be read."), (b"\xff\xfe\x00", "Your VM's answer could not be read."),
    (b"[" * 100_000, "Your VM's answer could not be read."), (b'{"text": "' + b"x" * (1 << 20) + b'"}', "Your VM's answer could not be read."),
    ({}, None), ({"text": None}, None), ({"text": 5}, None), ({"text": ["a"]}, None), ({"text": {}, "images": 7, "exitCode": "x"}, None),
    ({"text": "fine", "images": {"url": 3}, "exitCode": None}, None), (b'{"text": "half \\ud83d"}', None)],
    ids=lambda value: str(value)[:40])
async def test_whatever_a_vm_answers_its_owner_hears_something_and_the_lane_goes_on(world, answer, heard):
    vm = await world.ready()
    vm.then({"answer": answer})
    await world.text("odd")
    await world.text("even")
    await world.clock.until(lambda: "ran: even" in world.twilio.sent_to(ANN))
    first, second = world.twilio.sent_to(ANN)
    assert (first == heard if heard else first) and second == "ran: even"


@pytest.mark.parametrize("state", ["stopped", "suspended"])
async def test_a_machine_that_rests_is_started(world, state):
    world.fly.boot_s = 4.0
    vm = await world.ready()
    world.fly.rests(vm, state)
    await world.text("wake up")
    await world.hears(RESTARTING, "ran: wake up")
    assert world.fly.count("start_machine") == 1


async def test_an_answer_lost_on_the_way_is_fetched_with_the_same_key_and_not_run_again(world):
    vm = await world.ready()
    vm.then({"cut": "after"})
    await world.text("deploy")
    await world.hears("ran: deploy")
    assert vm.ran == ["deploy"] and len(vm.asked) == 2 and vm.asked[0].key == vm.asked[1].key


@pytest.mark.parametrize("reaction", [{"cut": "before"}, {"status": 504}, {"status": 502}])
async def test_a_text_cut_off_twice_in_a_row_is_not_tried_a_third_time(world, reaction):
    """The VM answers /health all the while: the road may be at fault once, not twice."""
    vm = await world.ready()
    vm.then(reaction, reaction)
    await world.text("rm -rf /")
    await world.text("still there?")
    await world.hears('Your VM went away twice while running this; not tried again: "rm -rf /"', "ran: still there?")
    assert [command.text for command in vm.asked] == ["rm -rf /", "rm -rf /", "still there?"]


async def test_an_answer_between_two_cuts_proves_that_the_vm_lived(world):
    vm = await world.ready()
    vm.then({"cut": "before"}, {"status": 409}, {"cut": "before"}, {})
    await world.text("patience")
    await world.hears("ran: patience")
    assert len(vm.asked) == 4


@pytest.mark.parametrize("reaction", [{"cut": "before"}, {"status": 504}])
async def test_a_text_that_takes_its_vm_down_twice_is_not_tried_a_third_time(world, reaction):
    vm = await world.ready()
    world.vms.fails("health", 503)
    vm.then(reaction)
    await world.text("rm -rf /")
    await world.hears(RESTARTING, "ran: rm -rf /")
    world.vms.fails("health", 503)
    world.vms.fails("health", 503)
    vm.then(reaction, reaction)
    await world.text("again")
    await world.clock.until(lambda: len(world.twilio.sent) == 4)
    assert world.twilio.sent_to(ANN)[2:] == [RESTARTING, 'Your VM went away twice while running this; not tried again: "again"']


async def test_a_502_of_a_vm_that_is_away_does_not_count_against_a_text(world):
    vm = await world.ready()
    vm.away = 502
    await world.text("patience")
    await world.clock.advance(60)
    await world.returns(vm)
    await world.hears(RESTARTING, "ran: patience")


async def test_a_busy_vm_is_waited_for_without_a_word(world):
    vm = await world.ready(VM_AWAY_LIMIT_S=30)
    vm.then(*[{"status": 409}] * 12)
    await world.text("when you can")
    await world.hears("ran: when you can")


async def test_no_answer_in_time_is_told_and_the_next_text_waits_for_the_busy_vm(world):
    vm = await world.ready(VM_COMMAND_TIMEOUT_S=0.1)
    gate = vm.holds()
    await world.text("sleep")
    await world.text("next")
    await world.clock.until(lambda: world.twilio.sent_to(ANN))
    assert re.fullmatch(r'No answer after 0\.1 s; it may still be running: "sleep"', world.twilio.sent_to(ANN)[0])
    gate.open()
    await world.clock.until(lambda: "ran: next" in world.twilio.sent_to(ANN))
    assert vm.ran == ["sleep", "next"] and len(world.twilio.sent_to(ANN)) == 2


async def drops(clock: FakeClock, drop: bytes, every_s: float):
    while True:
        yield drop
        await clock.sleep(every_s)


@pytest.mark.parametrize("silence", ["whole", "body"])
async def test_a_send_that_is_not_answered_within_30_s_is_looked_up_instead_of_made_again(world, silence):
    await world.ready()
    if silence == "whole":
        world.twilio.holds("send", after=True)
    else:
        world.twilio.fails("send", 201, body=drops(world.clock, b" ", 1), after=True)
    await world.text("deploy")
    await world.clock.advance(29)
    assert (world.twilio.count("send"), world.twilio.count("list")) == (1, 0)
    await world.clock.until(lambda: world.twilio.count("list") == 1)
    await world.clock.advance(60)
    assert world.twilio.sent_to(ANN) == ["ran: deploy"] and world.twilio.count("send") == 1


async def test_a_list_of_twilio_s_without_end_is_read_no_further_than_8_mib(world):
    await world.ready()
    world.twilio.drops("send", after=True)
    chunks = itertools.count()

    async def endless():
        while True:
            next(chunks)
            yield b" " * 2**20
    world.twilio.fails("list", 200, body=endless())
    await world.text("deploy")
    await world.clock.until(lambda: world.twilio.count("list") == 2)
    await world.clock.advance(60)
    await world.hears("ran: deploy")
    assert 8 <= next(chunks) < 20


async def test_an_answer_that_trickles_in_without_end_counts_as_none(world):
    vm = await world.ready()
    vm.then({"status": 200, "body": drops(world.clock, b" ", 60)})
    await world.text("drip")
    await world.clock.advance(329)
    assert not [words for words in world.twilio.sent_to(ANN) if words.startswith("No answer")]
    await world.clock.advance(2)
    assert world.twilio.sent_to(ANN)[-1] == 'No answer after 330 s; it may still be running: "drip"'


@pytest.mark.parametrize("set_by", [7200, -7200])
async def test_a_clock_that_is_set_makes_no_text_wait_too_long_or_not_at_all(world, set_by):
    vm = await world.ready(VM_AWAY_LIMIT_S=150)
    vm.away = 503
    await world.text("held")
    await world.clock.advance(15)
    world.clock.set_by = set_by
    await world.text("later")
    await world.clock.advance(75)
    assert world.twilio.sent_to(ANN) == [RESTARTING]
    vm.away = 0
    await world.hears(RESTARTING, "ran: held", "ran: later")
    vm.away = 503
    await world.text("too long")
    await world.clock.advance(175)
    assert world.twilio.sent_to(ANN)[3:] == [RESTARTING, 'Not run, your VM was away too long: "too long"']


async def test_texts_that_expire_together_share_one_notice(world):
    vm = await world.ready(VM_AWAY_LIMIT_S=60)
    vm.away = 503
    for body in ("one", "two", "three"):
        await world.text(body)
    await world.clock.advance(75)
    first, notice = world.twilio.sent_to(ANN)
    assert first == RESTARTING and notice.startswith("Not run, your VM was away too long: ") and all(f'"{body}"' in notice for body in ("one", "two", "three"))


async def test_a_text_that_perhaps_reached_its_vm_is_judged_from_its_cut(world):
    vm = await world.ready(VM_AWAY_LIMIT_S=60)
    vm.away = "cut"
    await world.text("deploy")
    await world.text("later")
    await world.clock.advance(75)
    first, *notices = world.twilio.sent_to(ANN)
    assert first == RESTARTING and len(notices) == 2 and notices[0].endswith('; it may still be running: "deploy"')
    assert notices[1] == 'Not run, your VM was away too long: "later"'


async def test_a_text_during_set_up_is_kept_and_run_when_the_vm_is_ready(world):
    await world.start()
    gate, job = await world.begin(world.fly, "wait_machine")
    assert (await world.text("early")).said == ""
    await world.hears("Your VM is being set up. Your text is kept.")
    gate.open()
    assert (await world.clock.run(job)).status == 201
    await world.hears("Your VM is being set up. Your text is kept.", "ran: early")


async def test_a_set_up_that_fails_tells_whose_text_was_not_run(world):
    await world.start()
    gate, job = await world.begin(world.fly, "set_secrets")
    await world.text("early")
    world.fly.fails("create_machine", 400)
    gate.open()
    assert (await world.clock.run(job)).status == 502
    await world.hears("Your VM is being set up. Your text is kept.", 'Your VM could not be set up. Not run: "early"')


async def test_a_full_queue_says_so_and_keeps_nothing_more(world):
    vm = await world.ready(QUEUE_LIMIT=2)
    gate = await world.occupies(vm, "running")
    await world.text("one")
    await world.text("two")
    for _ in range(2):  # the same words again for the same SID
        assert (await world.text("three", MessageSid="SM" + "3" * 32)).said == 'Your queue is full (2 waiting). This text was not kept: "three"'
    gate.open()
    await world.hears("ran: running", "ran: one", "ran: two")
    await world.text("three", MessageSid="SM" + "3" * 32)
    await world.clock.advance(5)
    assert vm.ran == ["running", "one", "two"]


async def test_a_stranger_is_told_where_to_sign_up_at_most_hourly(world):
    await world.start()
    words = "This number has no cockpit VM yet. Sign up: https://signup.example.com"
    assert (await world.text("hi", EVE, MessageSid="SM" + "1" * 32)).said == words
    assert (await world.text("hi", EVE, MessageSid="SM" + "1" * 32)).said == words, "the same SID is answered as before"
    assert (await world.text("hello?", EVE)).said == ""
    await world.clock.advance(3601)
    assert (await world.text("hello??", EVE)).said == words
    assert not world.twilio.sent


async def test_a_stranger_is_told_nothing_when_there_is_nowhere_to_sign_up(world):
    await world.start(ONBOARDING_URL="")
    assert (await world.text("hi", EVE)).said == ""


async def test_a_text_is_run_once_however_often_twilio_delivers_it(world):
    vm = await world.ready()
    answers = await asyncio.gather(*(world.text("once", MessageSid="SM" + "1" * 32) for _ in range(8)))
    await world.hears("ran: once")
    answers.append(await world.text("once", MessageSid="SM" + "1" * 32))
    await world.clock.advance(5)
    assert {answer.said for answer in answers} == {""} and vm.ran == ["once"]
    await world.hears("ran: once")


@pytest.mark.parametrize("code, status", [(20429, 429), (20503, 503), (21611, 400)])
async def test_what_twilio_asks_to_try_later_is_tried_later(world, told, code, status):
    vm = await world.ready()
    world.twilio.fails("send", status, times=3, code=code)
    await world.text("hello", MessageSid=(sid := "SM" + "1" * 32))
    await world.hears("ran: hello", within=900)
    whose = [(line["vm_id"], line["message_sid"]) for line in told() if line["event"] == "send_retry"]
    assert whose == [(vm.app, sid)] * 3


@pytest.mark.parametrize("code", [21211, 21408, 21610, 21614])
async def test_a_permanent_refusal_of_twilio_is_final_for_that_text_alone(world, code):
    await world.ready()
    world.twilio.fails("send", 400, code=code)
    await world.text("one")
    await world.clock.until(lambda: world.twilio.count("send"))
    await world.clock.advance(300)
    assert world.twilio.count("send") == 1


@pytest.mark.parametrize("arrived", [True, False], ids=["arrived", "did not arrive"])
@pytest.mark.parametrize("how", ["500", "dropped"])
async def test_an_answer_that_may_have_been_sent_is_looked_up_before_it_is_sent_again(world, how, arrived):
    vm = await world.ready()
    vm.answer = lambda text: {"text": "“done” – see…\tall", "images": [], "exitCode": 0, "durationMs": 1}
    await world.text("one")  # the same words earlier are not the answer looked for
    await world.clock.until(lambda: world.twilio.sent)
    await world.clock.advance(30)
    world.twilio.fails("send", 500, after=arrived, code=20500) if how == "500" else world.twilio.drops("send", after=arrived)
    await world.text("two")
    await world.clock.advance(120)
    assert len(world.twilio.sent) == 2 and world.twilio.count("list")
    assert world.twilio.count("send") == (2 if arrived else 3)


@pytest.mark.parametrize("how", ["refused", "cut", 502, 503, 504])
async def test_an_absent_vm_is_announced_once_and_what_waited_runs_in_order(world, how):
    vm = await world.ready()
    await world.leaves(vm, how)
    for body in ("one", "two", "three"):
        await world.text(body)
    await world.hears(RESTARTING)
    await world.clock.advance(40)
    assert len(vm.asked) <= 1, "nothing is posted until /health answers"
    assert world.fly.count("get_machine") and not world.fly.count("start_machine"), "the Machines API is asked; what runs is not started"
    await world.returns(vm)
    await world.hears(RESTARTING, "ran: one", "ran: two", "ran: three")
    assert vm.ran == ["one", "two", "three"] and len({command.key for command in vm.asked}) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 404, 422, 500])
async def test_another_status_is_told_to_the_owner_and_not_tried_again(world, status):
    vm = await world.ready()
    vm.then({"status": status, "headers": {"Location": world.vms.server.url + "/elsewhere"}})
    await world.text("go")
    await world.text("next")
    await world.hears(f'Your VM answered with an error ({status}): "go"', "ran: next")
    assert not world.vms.count("unknown"), "no redirect of a VM is followed"


async def test_a_text_that_waited_too_long_is_not_run_late_and_its_owner_reads_which(world):
    vm = await world.ready(VM_AWAY_LIMIT_S=60)
    vm.away = 503
    await world.text("x" * 100)
    await world.clock.advance(55)
    await world.hears(RESTARTING)
    await world.clock.advance(10)
    _, notice = world.twilio.sent_to(ANN)
    assert notice.startswith('Not run, your VM was away too long: "' + "x" * 79) and "x" * 81 not in notice
    vm.away = 0
    await world.text("fresh")
    await world.clock.until(lambda: "ran: fresh" in world.twilio.sent_to(ANN))
    assert vm.ran == ["fresh"]


# Conversations: what the phone says (>), what it hears (<), what happens meanwhile (~).

async def play(world: World, script: str) -> None:
    """Plays a conversation line by line; at each `<` exactly that is heard next, at the end nothing more."""
    vm, heard = await world.ready(VM_AWAY_LIMIT_S=100), []
    for line in [*filter(None, map(str.strip, script.splitlines())), "~ 0 s"]:
        kind, _, words = line.partition(" ")
        if kind != "<" and words != "a kill":
            await world.hears(*heard)
        match kind, words.replace("AWAY", RESTARTING).split():
            case ">", _:
                await world.text(words)
            case "<", _:
                heard.append(words.replace("AWAY", RESTARTING))
            case "~", [seconds, "s"]:
                await world.clock.advance(float(seconds))
            case "~", ["vm", "answers", status]:
                vm.away = int(status) if status.isdigit() else status
            case "~", ["vm", "is", "back"]:
                vm.away = 0
            case "~", ["vm", "next", "answers", status]:
                vm.then({"status": int(status)})
            case "~", ["vm", "next", "cuts", "off"]:
                vm.then({"cut": "after"})
            case "~", ["vm", "is", "slow"]:
                vm.holds()
            case "~", ["torn", "down"]:
                await world.call("DELETE", f"/provision/{vm.app}")
            case "~", ["a", "kill"]:  # wherever the gateway just is
                await world.crash_and_restart()
            case "~", ["gateway", "dies"]:
                await world.crash()
            case "~", ["gateway", "starts"]:
                await world.start()
            case "ran", _:
                assert vm.ran == (re.split(r",\s*", words) if words else [])
            case _:
                raise AssertionError(f"what is {line!r}?")


CONVERSATIONS = {
    "what waited runs in order when the VM is back, announced once": """
        ~ vm answers 503
        > one
        < AWAY
        > two
        > three
        ~ 40 s
        ~ vm is back
        < ran: one
        < ran: two
        < ran: three
        ran one, two, three""",
    "the next outage is announced again": """
        ~ vm answers 503
        > text 1
        < AWAY
        ~ vm is back
        < ran: text 1
        ~ vm answers 503
        > text 2
        < AWAY
        ~ vm is back
        < ran: text 2""",
    "what waited too long is not run late": """
        ~ vm answers 503
        > old
        < AWAY
        ~ 95 s
        < Not run, your VM was away too long: "old"
        ~ vm is back
        > fresh
        < ran: fresh
        ran fresh""",
    "the gateway's own downtime counts as waiting": """
        ~ vm answers 503
        > too late by then
        < AWAY
        ~ gateway dies
        ~ 101 s
        ~ vm is back
        ~ gateway starts
        < Not run, your VM was away too long: "too late by then"
        ran""",
    "an outage told once is not told again after a restart": """
        ~ vm answers 503
        > one
        < AWAY
        ~ gateway dies
        ~ gateway starts
        > two
        ~ 60 s
        ~ vm is back
        < ran: one
        < ran: two""",
    "another status is told and not tried again": """
        ~ vm next answers 500
        > go
        < Your VM answered with an error (500): "go"
        > next
        < ran: next
        ran next""",
    "cancel drops what waits for a VM that is away": """
        ~ vm answers 503
        > first
        < AWAY
        > cockpit cancel
        < Not run: 1 text dropped.
        ~ vm is back
        > second
        < ran: second
        ran second""",
    "a cut on the road to a VM that is well is not heard of": """
        ~ vm next cuts off
        > deploy
        < ran: deploy
        ran deploy""",
    "a teardown tells what was not run": """
        ~ vm answers 503
        > first
        < AWAY
        > second
        ~ torn down
        < Your VM is gone. Not run: "first", "second" Sign up: https://signup.example.com""",
    "a restart by text is done once and what waits runs then": """
        > cockpit restart
        < Your VM is being restarted. What waits will run when it is back.
        > hello
        < ran: hello
        ran hello""",
    "a new conversation begins with the next text and with no other": """
        > one
        < ran: one
        > cockpit new
        < The next text starts a new conversation.
        > two
        < ran: anew two
        > three
        < ran: three""",
    "what is stopped says what it had said and what waits runs next": """
        ~ vm is slow
        > long
        > next
        > cockpit stop
        < Stopped.
        < so far
        < ran: next
        ran long, next""",
    "the queue is told while the VM is away": """
        ~ vm answers 503
        > first
        < AWAY
        > cockpit status
        < Your VM has been away for 0 s. Nothing is running. 1 waiting.
        ~ vm is back
        < ran: first""",
}


@pytest.mark.parametrize("script", CONVERSATIONS.values(), ids=CONVERSATIONS)
async def test_conversation(world, script):
    await play(world, script)


def with_a_kill(script: str):
    """The same conversation, the gateway killed and started again once, at each place in turn."""
    lines = [line for line in map(str.strip, script.splitlines()) if line]
    for place in range(1, len(lines) + 1):
        killed = "\n".join([*lines[:place], "~ a kill", *lines[place:]])
        if lines[place - 1] in ("> old", "< AWAY"):  # nobody knows any more that it was not handed over
            killed = killed.replace('Not run, your VM was away too long: "old"', 'No answer after 100 s; it may still be running: "old"')
        if not any(line.startswith("~ gateway") for line in lines):
            yield killed


@pytest.mark.parametrize("script", [killed for script in CONVERSATIONS.values() for killed in with_a_kill(script)])
async def test_a_conversation_survives_a_kill_anywhere(world, script):
    await play(world, script)


# --- Answers ---

# Twilio's codes and what is done about each: the whole of its dictionary that a message of ours can meet.
ACTIONS = {
    "retry": "20429 20503 21611", "retry_and_alert": "20003 30002", "check_then_resend": "20500", "opted_out": "21610",
    "as_link": "11200 11751 12300 21612 21620 21670 30011 30019",
    "final": """14107 20404 21211 21212 21266 21408 21602 21603 21604 21606 21608 21609 21614 21617 21623 21624 21635 21701 21702 21703 21704
        21705 30001 30003 30004 30005 30006 30007 30008 30017 30022 30023 30027 30032 30034 30035 30036 30410 30450 63016 63018"""}
PNG, JPEG, GIF = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, b"\xff\xd8\xff\xe0" + b"jpeg" * 999, b"GIF89a" + b"gif" * 99


def shows(*images: str, text: str = "look") -> Callable[[str], Any]:
    """A VM's answer with images."""
    return lambda _: {"text": text, "images": [{"type": "image/png", "url": image} for image in images], "exitCode": 0, "durationMs": 1}


async def fetch(world, url: str, method: str = "GET") -> tuple[int, bytes, Any]:
    """What a plain client without keys gets at one of our public addresses."""
    async with world.session.request(method, url.replace(PUBLIC, world.twilio.gateway), allow_redirects=False) as response:
        return response.status, await response.read(), response.headers


async def an_image(world) -> tuple[FakeVM, str]:
    """A VM, and the link to an image that it has just shown."""
    vm = await world.sign_up()
    world.vms.images["x.png"] = ("image/png", PNG)
    vm.answer = shows("/images/x.png")
    await world.text("show me")
    await world.hears("look", "")
    return vm, world.twilio.media_sent[-1]


def unasked(world, vm: FakeVM, *, token: str = "", **body: Any):
    return world.call("POST", "/messages", key=token or vm.env["COCKPIT_TOKEN"], json=body)


def last_error(world, vm: FakeVM):
    return world.call("GET", f"/provision/{vm.app}")


def test_every_code_of_twilio_s_is_decided_by_the_table_and_told_in_words():
    decided = {code: policy.action for code, policy in cockpit.TWILIO_ERRORS.items()}
    assert decided == {code: action for action, codes in ACTIONS.items() for code in codes.split()}
    assert all(len(cockpit.explain_code(code)) > 25 and code in cockpit.explain_code(code) for code in decided)
    assert "10DLC" in cockpit.explain_code("30034") and "register" in cockpit.explain_code("30034") and "START" in cockpit.explain_code("21610")


@pytest.mark.parametrize("code, status, action", [
    ("", 429, "retry"), ("", 503, "retry"), ("99999", 502, "check_then_resend"), ("99999", 400, "final"), ("", 401, "retry_and_alert")])
def test_a_code_nobody_knows_is_decided_by_what_is_known_of_the_call(code, status, action):
    error = cockpit.kind_of_failure(status)("twilio", "create message", "", status=status, code=code, may_have_happened=status >= 500 and status != 503)
    assert cockpit.action_for(error) == action


@pytest.mark.parametrize("code", ["21408", "30034", "21614", "30007"])
async def test_what_cannot_be_delivered_is_told_on_the_vm_s_record_with_the_cure(world, code):
    await world.start()
    vm = await world.sign_up()
    await world.text("hello")
    await world.hears("ran: hello")
    if code < "30000":
        world.twilio.fails("send", 400, code=int(code))
        await world.text("again")
        await world.clock.until(lambda: world.twilio.count("send") == 2)
    else:
        assert (await world.twilio.reports("undelivered", code)).status == 204
    await world.clock.advance(300)
    assert cockpit.explain_code(code) in (await last_error(world, vm)).body["last_error"]
    await world.crash_and_restart()
    await world.text("more")
    await world.clock.until(lambda: len(world.twilio.sent) == 2)
    await world.restart()
    assert code in (await last_error(world, vm)).body["last_error"]
    await world.twilio.reports("delivered", message=[message for message in world.twilio.messages if message["callback"]][-1] | {"sid": "SM" + "f" * 32})
    assert (await last_error(world, vm)).body["last_error"] is None


def test_terminal_strings_are_removed_whole_and_never_past_their_line():
    assert cockpit.clean_text("a\x1bPq#0;2;0\x1b\\b\x1b_app\x1b\\c") == "abc"
    assert cockpit.clean_text("\x1b]0;no end\nkept") == "\nkept"


async def test_a_long_answer_arrives_complete_in_order_and_numbered(world):
    await world.start()
    vm = await world.sign_up()
    words = "".join(f"line {n}: all is well\n" for n in range(200))[:4300].rstrip()
    vm.answer = lambda text: {"text": words}
    world.twilio.fails("send", 503, times=2, code=20503)
    await world.text("long")
    await world.clock.until(lambda: len(world.twilio.sent) == 3)
    parts = world.twilio.sent_to(ANN)
    assert [part[:6] for part in parts] == ["(1/3) ", "(2/3) ", "(3/3) "] and "".join(part[6:] for part in parts) == words


async def test_images_arrive_as_links_that_anyone_who_has_them_can_open(world):
    await world.start()
    vm = await world.sign_up()
    world.vms.images |= {"a.png": ("image/png", PNG), "b.jpg": ("text/html", JPEG), "c.gif": ("image/gif", GIF)}
    vm.answer = shows("/images/a.png", "/images/b.jpg", "/images/c.gif")
    await world.text("draw")
    await world.hears("look", "", "", "")
    links = world.twilio.media_sent
    assert len(set(links)) == 3 and all(link.startswith(PUBLIC + "/media/") and "5551234567" not in link for link in links)
    for link, content, kind in zip(links, (PNG, JPEG, GIF), ("image/png", "image/jpeg", "image/gif")):
        status, got, headers = await fetch(world, link)
        assert (status, got, headers["Content-Type"]) == (200, content, kind)
        assert headers["X-Content-Type-Options"] == "nosniff" and "sandbox" in headers["Content-Security-Policy"]
        status, got, headers = await fetch(world, link, "HEAD")
        assert (status, got, headers["Content-Length"], headers["Content-Type"]) == (200, b"", str(len(content)), kind)


async def test_a_link_survives_a_restart_and_a_new_secret_and_ends_after_a_day(world):
    await world.start()
    _, link = await an_image(world)
    await world.crash_and_restart()
    assert (await fetch(world, link))[0] == 200
    await world.restart(COCKPIT_SECRET="a-new-root-of-tokens-0123456789abcdef," + SECRET)
    assert (await fetch(world, link))[0] == 200
    world.clock.elapsed += 86_000
    assert (await fetch(world, link))[0] == 200
    world.clock.elapsed += 500
    assert (await fetch(world, link))[0] == 410


async def test_a_link_with_one_character_changed_is_refused(world):
    await world.start()
    _, link = await an_image(world)
    start, asked = len(PUBLIC + "/media/"), world.vms.count("image")
    for at in range(start, len(link)):
        changed = link[:at] + ("A" if link[at] != "A" else "B") + link[at + 1:]
        assert (await fetch(world, changed))[0] == 403, at
    for changed in (link + "A", link[:-1], link[:start] + link[start:].replace(".", ""), PUBLIC + "/media/%C3%A9.%FF"):
        assert (await fetch(world, changed))[0] == 403
    assert world.vms.count("image") == asked


async def test_a_link_of_a_vm_or_an_image_that_is_gone_is_refused(world):
    await world.start()
    vm, link = await an_image(world)
    world.vms.fails("image", 404)
    assert (await fetch(world, link))[0] == 404
    world.vms.fails("image", 302, headers={"Location": "http://169.254.169.254/"})
    assert (await fetch(world, link))[0] == 404
    vm.away = "cut"
    assert (await fetch(world, link))[0] == 504
    vm.away = 0
    await world.call("DELETE", f"/provision/{vm.app}")
    await world.sign_up()
    assert (await fetch(world, link))[0] == 404


@pytest.mark.parametrize("content", [b"<svg onload=alert(1)>" * 9, b"<!doctype html>", b"", b"\x89PNG", b"RIFF0000WEBPVP8 ", PNG + bytes(5 << 20)])
async def test_only_png_jpeg_and_gif_of_at_most_5_mb_are_served_whatever_they_are_called(world, content):
    await world.start()
    vm = await world.sign_up()
    world.vms.images["x.png"] = ("image/png", content)
    vm.answer = shows("/images/x.png")
    await world.text("show me")
    await world.hears("look", "")
    assert (await fetch(world, world.twilio.media_sent[-1]))[0] == 404


@pytest.mark.parametrize("path", ["http://evil.example/x.png", "//evil.example/x.png", "/images/../secret", "/images/.hidden", "/images/a/b.png", "/etc/passwd",
                                  "/images/x.png?y", "/images/" + "x" * 200, "file:///etc/passwd", "", None, 7])
async def test_an_image_elsewhere_than_in_the_vm_s_own_folder_is_not_shown(world, path):
    await world.start()
    vm = await world.sign_up()
    vm.answer = shows(path)
    await world.text("show me")
    await world.hears("look")
    assert not world.twilio.media_sent and (await unasked(world, vm, images=[path])).status == 422


async def test_images_without_words_need_no_done_and_are_at_most_ten(world):
    await world.start()
    vm = await world.sign_up()
    vm.answer = shows(*(f"/images/{n}.png" for n in range(12)), text="")
    await world.text("draw")
    await world.hears(*[""] * 10)
    assert len(world.twilio.media_sent) == 10


async def test_only_images_not_yet_sent_are_sent_after_a_kill(world):
    await world.start()
    vm = await world.sign_up()
    vm.answer = shows("/images/a.png", "/images/b.png")
    gate = world.twilio.holds("send")
    await world.text("draw")
    for _ in range(2):  # the words and the first image arrive
        await world.clock.until(gate.arrived.is_set)
        opened, gate = gate, world.twilio.holds("send")
        opened.open()
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart()
    await world.hears("look", "", "")
    assert len(world.twilio.media_sent) == 2


async def test_equal_answers_before_and_after_a_restart_are_not_taken_for_one_another(world):
    await world.start()
    vm = await world.sign_up()
    vm.answer = lambda text: {"text": "the same"}
    gate = world.twilio.holds("send")
    await world.text("one")
    await world.text("two")
    await world.clock.until(lambda: len(vm.ran) == 2)
    world.twilio.fails("send", 503, times=1000, code=20503)
    gate.open()
    await world.clock.until(lambda: world.twilio.count("send") > 3)
    await world.restart()
    world.twilio.heals("send")
    await world.hears("the same", "the same")


@pytest.mark.parametrize("code", [21612, 21670])
async def test_a_picture_that_is_refused_goes_as_words_and_a_link(world, code):
    await world.start()
    vm = await world.sign_up()
    world.vms.images["x.png"] = ("image/png", PNG)
    vm.answer = shows("/images/x.png", text="")
    world.twilio.fails("send", 400, code=code)
    await world.text("draw")
    await world.clock.until(lambda: world.twilio.sent)
    words, link = world.twilio.sent_to(ANN)[-1].rsplit(" ", 1)
    assert "image" in words and (await fetch(world, link))[1] == PNG
    await world.crash_and_restart()
    await world.clock.advance(100)
    assert len(world.twilio.sent) == 1


@pytest.mark.parametrize("code", [30011, 30008, 14107])
async def test_what_twilio_took_and_could_not_deliver_is_not_sent_again(world, code):
    vm = await world.ready()
    await world.text("hello")
    await world.hears("ran: hello")
    assert (await world.twilio.reports("undelivered", code)).status == 204
    await world.clock.advance(100)
    assert len(world.twilio.sent) == 1
    assert str(code) in (await world.call("GET", f"/provision/{vm.app}")).body["last_error"]


async def test_words_in_a_picture_s_place_are_looked_up_after_a_kill(world):
    await world.start()
    vm = await world.sign_up()
    vm.answer = shows("/images/x.png", text="")
    world.twilio.fails("send", 400, code=21612)
    gate = world.twilio.holds("send", after=True)
    await world.text("draw")
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart()
    await world.clock.advance(100)
    assert len(world.twilio.sent) == 1 and world.twilio.count("list")


async def test_delivery_callbacks_are_counted_once_in_whatever_order_they_come(world):
    await world.start()
    await world.sign_up()
    answer = await world.twilio.posts("/sms/status", {"MessageSid": "SMx", "MessageStatus": "sent", "AccountSid": ACCOUNT}, signature="forged")
    assert answer.status == 403
    await world.text("hello", MessageSid="SM" + "7" * 32)
    await world.hears("ran: hello")
    assert world.twilio.callbacks[0].startswith(f"{PUBLIC}/sms/status?") and "5551234567" not in world.twilio.callbacks[0]
    for status in ("delivered", "sent", "queued", "delivered"):
        assert (await world.twilio.reports(status)).status == 204
    await world.twilio.reports("sent", message=world.twilio.messages[-1] | {"sid": "SM" + "9" * 32})  # its create is not answered yet
    metrics = (await world.call("GET", "/metrics")).text
    assert 'cockpit_deliveries_total{status="delivered"} 1' in metrics and 'cockpit_deliveries_total{status="sent"} 1' in metrics and 'status="queued"' not in metrics
    steps = (await world.call("GET", "/messages/SM" + "7" * 32)).body["steps"]
    assert steps[-1]["step"] == "delivered"
    assert (await world.twilio.reports("no such status")).status == 204


async def test_no_callback_is_asked_for_where_twilio_could_not_call(world):
    await world.start(PUBLIC_URL="https://127.0.0.1:8443")
    world.twilio.public = "https://127.0.0.1:8443"
    await world.sign_up()
    await world.text("hello")
    await world.hears("ran: hello")
    assert not world.twilio.callbacks


async def test_an_owner_who_opted_out_at_twilio_is_texted_no_more_until_start(world):
    await world.start()
    vm = await world.sign_up()
    world.twilio.fails("send", 400, code=21610)
    await world.text("one")
    await world.clock.until(lambda: world.twilio.count("send"))
    await world.text("two")
    await world.clock.advance(60)
    assert world.twilio.count("send") == 1 and vm.ran == ["one", "two"]
    assert "START" in (await last_error(world, vm)).body["last_error"]
    await world.crash_and_restart()
    await world.text("three")
    await world.clock.advance(60)
    assert world.twilio.count("send") == 1
    await world.text("Start ")
    await world.text("four")
    await world.hears("ran: four")
    assert (await last_error(world, vm)).body["last_error"] is None


@pytest.mark.parametrize("word", ["STOP", "stopall", " Unsubscribe ", "CANCEL", "end", "QUIT", "revoke", "OPTOUT"])
async def test_a_stop_word_is_recorded_not_run_and_nothing_is_sent_until_start(world, word):
    await world.start(TEXT_LIMIT=3)
    vm = await world.sign_up()
    assert (await world.text(word)).said == ""
    await world.crash_and_restart()
    for body in ("one", "two", "three", "too many"):
        assert (await world.text(body)).said == ""
    await world.clock.until(lambda: vm.ran == ["one", "two", "three"])
    assert (await unasked(world, vm, text="hello?")).status == 409
    await world.clock.advance(100)
    assert not world.twilio.count("send")
    await world.text("yes")
    await world.text("yes")
    await world.hears("ran: yes")
    assert vm.ran[3:] == ["yes"]


@pytest.mark.parametrize("body, more, run", [
    ("stop please", {}, True), ("yes", {}, True), ("cancel that", {}, True),
    ("help", {}, False), ("INFO", {}, False), ("START", {}, False), ("unstop", {}, False), ("arret", {"OptOutType": "STOP"}, False), ("aide", {"OptOutType": "HELP"}, False)])
async def test_only_the_words_that_twilio_answers_itself_are_kept_from_the_vm(world, body, more, run):
    await world.start()
    vm = await world.sign_up()
    await world.text(body, **more)
    await world.clock.advance(30)
    assert vm.ran == [body] * run
    await world.text("next")
    await world.clock.until(lambda: vm.ran[-1:] == ["next"])
    await world.clock.advance(30)
    assert bool(world.twilio.sent) == (more != {"OptOutType": "STOP"})


@pytest.mark.parametrize(("late", "in_time", "sent"), [("STOP", "START", True), ("START", "STOP", False)])
async def test_of_stop_and_start_the_later_one_counts_though_the_earlier_is_found_late(world, late, in_time, sent):
    vm = await world.ready(BACKFILL_S=60)
    await world.clock.advance(5)
    world.twilio.missed(ANN, late)
    await world.clock.advance(1)
    await world.text(in_time)
    await world.clock.advance(60)
    await world.crash_and_restart()
    await world.text("hello")
    await world.clock.until(lambda: vm.ran == ["hello"])
    await world.clock.advance(30)
    assert world.twilio.sent_to(ANN) == ["ran: hello"] * sent


async def test_a_stop_delivered_twice_does_not_undo_the_start_between(world):
    await world.ready()
    sid = "SM" + "5" * 32
    for word, more in (("STOP", {"MessageSid": sid}), ("START", {}), ("STOP", {"MessageSid": sid})):
        await world.text(word, **more)
    await world.text("hello")
    await world.hears("ran: hello")


async def test_start_counts_also_after_the_clock_was_set_back(world):
    await world.ready()
    await world.text("STOP")
    world.clock.set_by = -7200
    await world.text("START")
    await world.crash_and_restart()
    await world.text("hello")
    await world.hears("ran: hello")


async def test_a_stranger_s_stop_is_not_answered_with_an_invitation(world):
    await world.start()
    assert (await world.text("STOP", phone=EVE)).said == ""
    assert "Sign up" in (await world.text("hello", phone=EVE)).said


async def test_whatsapp_shares_the_route_is_answered_there_and_opts_out_by_itself(world):
    await world.start()
    vm = await world.sign_up()
    await world.text("hi", phone="whatsapp:" + ANN, To="whatsapp:" + NUMBER)
    await world.hears("ran: hi", phone="whatsapp:" + ANN)
    assert world.twilio.messages[-1]["from"] == "whatsapp:" + NUMBER
    await world.text("STOP", phone="whatsapp:" + ANN, To="whatsapp:" + NUMBER)
    await world.text("by sms")
    await world.hears("ran: by sms")
    assert vm.ran == ["hi", "by sms"]


async def test_a_vm_texts_its_owner_unasked_in_the_order_of_its_lane(world):
    await world.start()
    vm = await world.sign_up()
    world.vms.images["x.png"] = ("image/png", PNG)
    gate = world.twilio.holds("send")
    await world.text("hello")
    await world.clock.until(gate.arrived.is_set)
    for n in range(3):
        assert (await unasked(world, vm, text=f"[{n}/3] \x1b[32mdone\x1b[0m")).status == 202
    assert (await unasked(world, vm, text="a picture", images=[{"type": "image/png", "url": "/images/x.png"}])).status == 202
    await world.crash_and_restart()
    await world.hears("ran: hello", "[0/3] done", "[1/3] done", "[2/3] done", "a picture", "")
    assert (await fetch(world, world.twilio.media_sent[-1]))[1] == PNG


async def test_a_vm_that_repeats_a_message_beside_others_is_limited_no_less(world):
    """The repetition costs nothing; the one stored in the same moment is counted all the same."""
    vm, taken = await world.ready(), 0

    def tells(key: str, text: str) -> Any:
        return world.ask("POST", "/messages", key=vm.env["COCKPIT_TOKEN"], headers={"Idempotency-Key": key}, json={"text": text})

    await world.clock.run(tells("first", "hello"))
    for n in range(8):
        with contextlib.closing(sqlite3.connect(world.database)) as disk:
            disk.execute("BEGIN IMMEDIATE")
            both = []
            for key, text in (("first", "hello"), (f"other {n}", "eight parts " * 1000)):
                both.append(asyncio.ensure_future(tells(key, text)))
                await asyncio.sleep(0.02)
        taken += (await world.clock.run(asyncio.gather(*both)))[1].status == 202
    assert taken == 4, "40 a minute"


async def test_a_vm_s_own_messages_are_limited_by_the_minute_and_by_the_day(world):
    await world.start()
    vm, other = await world.sign_up(), await world.sign_up(BOB)
    three = {"text": "x" * 3000, "images": ["/images/x.png"]}  # two parts and a picture
    answers = [await unasked(world, vm, **three) for _ in range(14)]
    assert [answer.status for answer in answers] == [202] * 13 + [429]
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 61
    assert (await unasked(world, vm, text="one more is the fortieth")).status == 202
    assert (await unasked(world, other, text="mine are my own")).status == 202
    for _ in range(11):
        world.clock.elapsed += 61
        assert {(await unasked(world, vm, **message)).status for message in [three] * 13 + [{"text": "one"}]} == {202}
    world.clock.elapsed += 61
    assert {(await unasked(world, vm, text=f"{n}")).status for n in range(20)} == {202}
    world.clock.elapsed += 61
    await world.restart()
    refused = await unasked(world, vm, text="one more")
    assert refused.status == 429 and refused.body["code"] == "too_many" and int(refused.headers["Retry-After"]) > 3600
    world.clock.elapsed += 86_400
    assert (await unasked(world, vm, text="a new day")).status == 202


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"text": " \x1b[0m\n"}, {"text": 7}, {"text": "x", "images": "x"}, {"text": "x", "phone": BOB},
                                  {"images": ["/images/x.png"] * 11}, {"images": [["/images/x.png"]]}])
async def test_a_vm_s_message_that_says_nothing_or_something_else_is_refused(world, body):
    await world.start()
    vm = await world.sign_up()
    answer = await unasked(world, vm, **body)
    assert answer.status == 422 and answer.body["errors"] and not world.twilio.sent


async def test_only_a_vm_s_own_token_speaks_for_it_and_only_while_it_exists(world):
    await world.start()
    vm = await world.sign_up()
    token = vm.env["COCKPIT_TOKEN"]
    for wrong in (KEY, token[:-1], token + "x", vm.app + ".", "cockpit-vm-aaaaaaaa." + token.partition(".")[2], "x"):
        answer = await unasked(world, vm, token=wrong, text="hello")
        assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    await world.call("DELETE", f"/provision/{vm.app}")
    await world.sign_up()
    assert (await unasked(world, vm, token=token, text="a ghost")).status == 401
    await world.clock.advance(60)
    assert not world.twilio.sent


async def test_a_vm_s_own_message_leaves_from_where_its_owner_last_texted(world):
    await world.start()
    vm = await world.sign_up()
    await world.text("hi", phone="whatsapp:" + ANN, To="whatsapp:" + NUMBER)
    await world.hears("ran: hi", phone="whatsapp:" + ANN)
    await world.restart()
    await world.crash_and_restart()
    await unasked(world, vm, text="here")
    await world.hears("ran: hi", "here", phone="whatsapp:" + ANN)
    await world.text("now by sms", To="+15550009999")
    await world.crash_and_restart()
    await unasked(world, vm, text="and here")
    await world.hears("ran: now by sms", "and here")
    assert [message["from"] for message in world.twilio.messages if message["body"] == "and here"] == ["+15550009999"]


async def test_a_message_taken_from_a_vm_is_sent_even_if_the_gateway_is_killed(world):
    await world.start()
    vm = await world.sign_up()
    gate = world.twilio.holds("send")
    assert (await unasked(world, vm, text="[3/11] done")).status == 202
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart()
    await world.hears("[3/11] done")


async def test_a_vm_s_message_is_texted_once_for_each_key(world):
    vm = await world.ready()
    for key in ("a", "a", "b"):
        headers = {"Idempotency-Key": key}
        answer = await world.call("POST", "/messages", key=vm.env["COCKPIT_TOKEN"], headers=headers, json={"text": f"with {key}"})
        assert answer.status == 202, answer.text
        await world.clock.advance(1)
        await world.crash_and_restart()
    await world.hears("with a", "with b")


async def test_a_picture_from_a_phone_is_opened_by_its_vm_through_a_link(world):
    await world.start()
    vm = await world.sign_up()
    path = world.twilio.ROOT + "/Messages/MM1/Media/ME1"
    world.twilio.media[path] = ("image/jpeg", JPEG)
    more = {"NumMedia": "2", "MediaUrl0": world.twilio.server.url + path, "MediaContentType0": "image/jpeg", "MediaUrl1": "http://evil.example/x", "MediaContentType1": "image/png"}
    await world.text("", **more)
    await world.clock.until(lambda: vm.asked)
    media, = vm.asked[0].media
    assert media["content_type"] == "image/jpeg" and media["url"].startswith(PUBLIC + "/media/") and AUTH_TOKEN not in media["url"]
    status, got, headers = await fetch(world, media["url"])
    assert (status, got, headers["Content-Type"]) == (200, JPEG, "image/jpeg")
    world.twilio.media[path] = ("text/html", b"<script>alert(1)</script>")
    status, got, headers = await fetch(world, media["url"])
    assert status == 200 and headers["Content-Type"] == "application/octet-stream" and headers["X-Content-Type-Options"] == "nosniff"
    world.twilio.media[path] = ("image/jpeg", JPEG + bytes(5 << 20))
    assert (await fetch(world, media["url"]))[0] == 404
    del world.twilio.media[path]
    assert (await fetch(world, media["url"]))[0] == 404


async def test_our_twilio_credentials_stay_with_twilio_when_it_redirects(world):
    await world.start()
    vm = await world.sign_up()
    path = world.twilio.ROOT + "/Messages/MM1/Media/ME1"
    world.twilio.media[path] = world.vms.server.url.replace("127.0.0.1", "localhost") + "/store/images/x.png"
    world.vms.images["x.png"] = ("image/png", PNG)
    world.vms.boot("store", lambda: True, {})
    world.vms.open_to_all = True
    await world.text("see", NumMedia="1", MediaUrl0=world.twilio.server.url + path, MediaContentType0="image/png")
    await world.clock.until(lambda: vm.asked)
    assert (await fetch(world, vm.asked[0].media[0]["url"]))[1] == PNG
    assert "Authorization" in world.twilio.calls("media")[-1].headers and "Authorization" not in world.vms.calls("image")[-1].headers


async def test_an_image_of_untold_length_is_passed_on_whole_or_visibly_cut_at_5_mb(world):
    await world.start()
    _, link = await an_image(world)
    world.vms.images["x.png"] = ("image/png", [PNG[:3], PNG[3:]])
    assert (await fetch(world, link))[1] == PNG
    world.vms.images["x.png"] = ("image/png", [PNG] + [bytes(1 << 20)] * 6)
    with pytest.raises(aiohttp.ClientError):
        await fetch(world, link)


async def test_a_picture_that_arrived_while_nobody_listened_is_fetched_too(world):
    await world.start(BACKFILL_S=60)
    vm = await world.sign_up()
    sid = world.twilio.missed(ANN, "see")
    world.twilio.messages[-1]["num_media"] = "1"
    path = f"{world.twilio.ROOT}/Messages/{sid}/Media"
    world.twilio.media[path + ".json"] = {"media_list": [{"sid": "ME1", "content_type": "image/gif", "uri": path + "/ME1.json"}]}
    world.twilio.media[path + "/ME1"] = ("image/gif", GIF)
    await world.clock.until(lambda: vm.asked)
    assert vm.asked[0].media[0]["content_type"] == "image/gif" and (await fetch(world, vm.asked[0].media[0]["url"]))[1] == GIF


async def test_a_long_command_is_told_of_after_a_minute_then_every_five_six_times(world):
    await world.start(VM_COMMAND_TIMEOUT_S=9000)
    vm = await world.sign_up()
    gate = vm.holds()
    await world.text("long")
    await world.clock.until(gate.arrived.is_set)
    began = world.clock.elapsed
    told = [60 + 300 * n for n in range(6)]
    for at in told:
        await world.clock.advance(began + at - 2 - world.clock.elapsed)
        assert world.twilio.sent_to(ANN) == ["Still working on it."] * told.index(at)
        await world.clock.advance(4)
        assert world.twilio.sent_to(ANN) == ["Still working on it."] * (told.index(at) + 1)
    await world.clock.advance(700)
    assert len(world.twilio.sent) == 6
    gate.open()
    await world.clock.until(lambda: len(world.twilio.sent) == 7)
    assert world.twilio.sent_to(ANN)[-1] == "ran: long"
    await world.clock.advance(100)
    assert len(world.twilio.sent) == 7


async def test_nobody_says_that_a_command_still_runs_while_its_vm_tells_of_itself(world):
    await world.start(VM_COMMAND_TIMEOUT_S=9000)
    vm = await world.sign_up()
    gate = vm.holds()
    await world.text("long")
    await world.clock.until(gate.arrived.is_set)
    for n in range(3):
        await world.clock.advance(50)
        assert (await unasked(world, vm, text=f"step {n}")).status == 202
    await world.clock.advance(290)
    assert world.twilio.sent_to(ANN) == ["step 0", "step 1", "step 2"]
    await world.clock.advance(15)
    assert world.twilio.sent_to(ANN)[3:] == ["Still working on it."]
    gate.open()


async def test_a_welcome_is_texted_when_asked_for_and_only_then(world):
    await world.start()
    await world.sign_up(welcome=True)
    await world.hears("Your VM is ready. Text me anything.")
    await world.sign_up(BOB)
    await world.clock.advance(60)
    assert not world.twilio.sent_to(BOB)


@pytest.mark.parametrize("url", ["", "nonsense", "http://[bad", "http://vm:99999"])
async def test_the_owner_hears_of_a_vm_whose_address_is_none(world, url):
    await world.ready(VM_AWAY_LIMIT_S=100)
    await world.stop()
    saved = world.saved
    saved["routes"][ANN]["vm_url"] = url
    world.file.write_text(json.dumps(saved))
    await world.start()
    await world.text("hello")
    await world.clock.advance(110)
    await world.hears(RESTARTING, 'No answer after 100 s; it may still be running: "hello"')


async def test_an_error_of_the_vm_ends_a_text_as_an_answer_does(world):
    await world.start(VM_AWAY_LIMIT_S=30)
    vm = await world.sign_up()
    gate = world.vms.holds("command")
    vm.then({"status": 500})
    await world.text("first")
    await world.text("second")
    await world.clock.until(gate.arrived.is_set)
    await world.clock.advance(31)
    gate.open()
    await world.hears('Your VM answered with an error (500): "first"', "ran: second")


async def test_a_vm_s_return_is_seen_while_fly_does_not_answer(world):
    await world.start()
    vm = await world.sign_up()
    world.fly.fails("get_machine", 429, times=10_000)
    vm.away = 503
    await world.text("hello")
    await world.clock.advance(20)
    vm.away = 0
    await world.hears(RESTARTING, "ran: hello", within=10)


async def test_a_body_that_is_not_what_its_header_says_is_no_cut(world):
    await world.start()
    vm = await world.sign_up()
    vm.then({"status": 200, "body": b"not gzip", "headers": {"Content-Encoding": "gzip"}})
    await world.text("go")
    await world.hears("Your VM's answer could not be read.")
    assert len(vm.asked) == 1


async def test_an_exit_code_without_end_is_not_texted(world):
    await world.start()
    vm = await world.sign_up()
    vm.then({"answer": b'{"text": "", "exitCode": 1' + b"0" * 4000 + b"}"})
    await world.text("go")
    await world.hears("Done, no output.")


async def test_a_text_that_names_too_many_pictures_is_a_text(world):
    await world.start()
    await world.sign_up()
    await world.text("hello", NumMedia="9" * 5000)
    await world.hears("ran: hello")


# --- Whose phone it is ---

ASKED, CONNECTED = "Text the code from the sign-up page to connect this phone.", "Connected. Text me anything."
LOCKED = "Locked. Nothing is run until you text the code from the sign-up page."


async def code_of(world, vm: FakeVM) -> str:
    """What the sign-up page shows."""
    record = (await world.call("GET", f"/provision/{vm.app}")).body
    assert record["paired"] is False and re.fullmatch(r"\d{6}", record["pairing_code"])
    return record["pairing_code"]


async def unpaired(world, **changes: Any) -> tuple[FakeVM, str]:
    """A gateway with a VM for Ann that wants its code."""
    await world.start(**changes)
    vm = await world.sign_up(verify=True)
    return vm, await code_of(world, vm)


async def paired(world, **changes: Any) -> FakeVM:
    vm, code = await unpaired(world, **changes)
    await world.text(code)
    await world.hears(CONNECTED)
    return vm


async def lock(world, vm: FakeVM) -> str:
    """Locks by the page; the new code."""
    answer = await world.call("POST", f"/provision/{vm.app}/lock")
    assert answer.status == 200, answer.text
    assert answer.body["paired"] is False
    return answer.body["pairing_code"]


def wrong(code: str, n: int = 1) -> str:
    return f"{(int(code) + n) % 10**6:06}"


async def test_the_code_pairs_a_phone_and_the_next_text_runs(world):
    vm, code = await unpaired(world)
    await world.text("hello")
    await world.hears(ASKED)
    assert not vm.asked and not world.rows("SELECT * FROM texts")
    await world.text(code)
    await world.hears(ASKED, CONNECTED)
    record = (await world.call("GET", f"/provision/{vm.app}")).body
    assert record["paired"] is True and "pairing_code" not in record
    await world.text("hello again")
    await world.hears(ASKED, CONNECTED, "ran: hello again")
    assert vm.ran == ["hello again"]


@pytest.mark.parametrize("setting, asked, is_paired", [("off", {}, True), ("on", {}, False), ("on", {"verify": False}, True), ("off", {"verify": True}, False)])
async def test_the_field_decides_and_the_setting_where_there_is_none(world, setting, asked, is_paired):
    await world.start(VERIFY_PHONE=setting)
    assert (await world.provision(**asked)).body["paired"] is is_paired


def test_a_setting_that_is_neither_on_nor_off_is_refused():
    assert any("VERIFY_PHONE" in problem for problem in problems(settings(VERIFY_PHONE="yes")))


@pytest.mark.parametrize("typed", ["482 913", "482-913", " 4 8-2\n9 1 3 ", "482–913", "482\u00a0913"])
async def test_spaces_and_dashes_in_a_code_do_not_matter(world, typed):
    vm, code = await unpaired(world)
    await world.text(typed.translate(dict(zip(map(ord, "482913"), code, strict=True))))
    await world.hears(CONNECTED)
    assert not vm.asked


@pytest.mark.parametrize("body, more", [
    ("rm -rf /", {}), ("", {}), ("cockpit status", {}), ("cockpit restart", {}), ("cockpit lock", {}), ("YES", {}), ("hello", {"From": f"whatsapp:{ANN}", "To": f"whatsapp:{NUMBER}"}),
    ("look", {"NumMedia": "1", "MediaUrl0": "https://api.twilio.com/x"}), ("{code}0", {}), ("code {code}", {}), ("{code} {code}", {})])
async def test_nothing_reaches_a_vm_before_the_code_whatever_it_is_and_however_often(world, body, more):
    vm, code = await unpaired(world, QUEUE_LIMIT=1)
    sid = "SM" + "7" * 32
    for _ in range(2):
        await world.text(body.format(code=code), MessageSid=sid, **more)
        await world.text(body.format(code=code), **more)
        await world.clock.advance(5)
        await world.crash_and_restart()
    await world.clock.advance(100)
    sent = [message["body"] for message in world.twilio.messages if message["direction"] == "outbound-api"]
    assert sent == [ASKED] and not vm.asked and not world.fly.count("restart_machine")
    await world.text(code)
    await world.clock.advance(100)
    await world.text(body.format(code=code), MessageSid=sid, **more)
    await world.clock.advance(100)
    assert not vm.asked, "what was refused is not run later"


async def test_a_phone_is_asked_for_its_code_at_most_hourly_also_across_restarts(world):
    await unpaired(world)
    for minutes in (0, 20, 20, 15, 10, 49, 2):
        await world.clock.advance(minutes * 60)
        await world.text("hello?")
        await world.restart()
    await world.clock.advance(5)
    assert world.twilio.sent_to(ANN) == [ASKED] * 2


async def test_a_phone_never_paired_is_sent_nothing_else(world):
    world.twilio.media["x"] = ("", b"")
    await world.start(RECONCILE_S=EVERY, TEXT_LIMIT=2)
    gate, job = await world.begin(world.fly, "create_machine", verify=True, welcome=True)
    for body in ("early", "cockpit status", "cockpit help", "HELP"):
        await world.text(body)
    gate.open()
    vm = world.vms[(await world.clock.run(job)).body["vm_id"]]
    refused = await unasked(world, vm, text="your VM speaks")
    assert (refused.status, refused.body["code"]) == (409, "wrong_state")
    await lock(world, vm)
    await world.text("later")
    world.fly.everything.clear()
    await sweeps(world, 3)
    assert (await world.call("GET", f"/provision/{vm.app}")).body["state"] == "failed"
    await world.call("DELETE", f"/provision/{vm.app}")
    await world.clock.advance(60)
    assert world.twilio.sent_to(ANN) == [ASKED]


async def test_a_phone_paired_during_set_up_is_served_like_any_other(world):
    await world.start(RECONCILE_S=EVERY)
    gate, job = await world.begin(world.fly, "create_machine", after=True, verify=True, welcome=True)
    code = (await world.call("GET", "/provision")).body["vms"][0]["pairing_code"]
    await world.text(code)
    await world.text("early")
    await world.hears(CONNECTED, "Your VM is being set up. Your text is kept.")
    gate.open()
    vm = world.vms[(await world.clock.run(job)).body["vm_id"]]
    await world.hears(CONNECTED, "Your VM is being set up. Your text is kept.", "Your VM is ready. Text me anything.", "ran: early")
    await sweeps(world, 2)
    assert world.fly.machines[0].config["metadata"]["cockpit_pairing"] == "0:paired", "though it was created unpaired"
    assert vm.ran == ["early"]


async def test_a_phone_that_signs_up_again_gets_another_code(world):
    vm, code = await unpaired(world)
    await world.call("DELETE", f"/provision/{vm.app}")
    again = await world.sign_up(verify=True)
    assert await code_of(world, again) != code
    await world.text(code)
    await world.hears(ASKED)
    assert not vm.asked and not again.asked


async def test_stop_and_start_count_before_the_code_as_ever(world):
    vm, code = await unpaired(world)
    await world.text("STOP")
    await world.text("hello")
    await world.text("START")
    await world.text(code)
    await world.text("go")
    await world.clock.until(lambda: vm.ran)
    await world.clock.settle()
    assert world.twilio.sent_to(ANN) == [CONNECTED, "ran: go"]


async def test_whatsapp_goes_by_the_same_door_and_is_answered_there(world):
    vm, code = await unpaired(world)
    there = {"From": f"whatsapp:{ANN}", "To": f"whatsapp:{NUMBER}"}
    await world.text("hello", **there)
    await world.hears(ASKED, phone=f"whatsapp:{ANN}")
    await world.text(code, **there)
    await world.text("by text")
    await world.hears("ran: by text")
    await world.hears(ASKED, CONNECTED, phone=f"whatsapp:{ANN}")
    assert vm.ran == ["by text"]


async def test_a_phone_that_could_not_be_asked_for_its_code_is_asked_once_it_can_be(world):
    await unpaired(world)
    for body in ("STOP", "hello", "START", "hello again"):
        await world.text(body)
    await world.hears(ASKED)


async def test_the_present_code_is_never_run_and_any_other_six_digits_are(world):
    vm, code = await unpaired(world)
    await world.text(code)
    await world.hears(CONNECTED)
    gate = await world.occupies(vm, "busy")
    await world.text(f"{code[:3]} {code[3:]}")
    await world.text(wrong(code))
    gate.open()
    await world.hears(CONNECTED, CONNECTED, "ran: busy", f"ran: {wrong(code)}")
    assert vm.ran == ["busy", wrong(code)]


# Guessing

async def test_ten_wrong_codes_close_a_vm_for_an_hour_and_health_says_so(world):
    vm, code = await unpaired(world)
    for n in range(1, 10):
        await world.text(wrong(code, n))
    await world.text("12345")
    await world.text("hello")
    assert not await troubles(world)
    await world.text(wrong(code, 10))
    assert vm.app in await troubles(world) and code not in await troubles(world)
    assert (await world.call("GET", "/health", key=None)).body["troubles"] == ["routes"]
    await world.crash_and_restart()
    await world.clock.advance(3590)
    await world.text(code)
    assert await code_of(world, vm) == code and vm.app in await troubles(world)
    await world.clock.advance(20)
    assert not await troubles(world)
    await world.text(code)
    await world.clock.advance(5)
    assert world.twilio.sent_to(ANN) == [ASKED, CONNECTED]


async def test_guessing_as_fast_as_allowed_finds_a_code_within_a_year_with_a_chance_below_1_in_100(world):
    """Ten guesses, then closed for 1, 2, 4, 8, 16 hours, from then on 24 h each time. The first five closings take 31 h, the rest of a year
    (8,760 h) has room for 8,729 / 24 = 363 more: 369 rounds and the first one are 370 x 10 = 3,700 guesses. While two secrets are set two of the
    1,000,000 codes count: 3,700 x 2 / 1,000,000 = 0.74 % a year (one secret: 0.37 %).
    """
    _, code = await unpaired(world, COCKPIT_SECRET=f"{'another-root-' * 4},{SECRET}")
    hours, guesses = [], 0
    while len(hours) < 7:
        for _ in range(10):
            guesses += 1
            await world.text(wrong(code, guesses * 7))
        until = cockpit.parse_utc(world.saved["routes"][ANN]["closed_until"])
        hours.append(round((until - world.clock.now()) / 3600, 3))
        world.clock.elapsed = until - world.clock.now() + world.clock.elapsed + 0.01
    assert hours == [1, 2, 4, 8, 16, 24, 24]
    rounds = 1 + 5 + int((365 * 24 - sum(hours[:5])) / 24) + 1
    assert rounds * 10 == 3700
    assert rounds * 10 * 2 / 1_000_000 < 0.01


async def test_many_guesses_in_one_moment_are_counted_one_by_one(world):
    vm, code = await unpaired(world)
    guesses = [wrong(code, n) for n in range(1, 31)]
    await world.clock.run(asyncio.gather(*(world.text(guess) for guess in [*guesses, code])))
    assert await code_of(world, vm) == code, "the code came after the tenth wrong one"
    assert world.saved["routes"][ANN]["wrong_codes"] == 10


async def test_a_wrong_code_delivered_again_is_not_counted_again(world):
    vm, code = await unpaired(world)
    for _ in range(12):
        await world.text(wrong(code), MessageSid="SM" + "9" * 32)
    assert world.saved["routes"][ANN]["wrong_codes"] == 1 and not await troubles(world)


async def test_a_new_code_from_the_page_opens_a_closed_vm(world):
    vm, code = await unpaired(world)
    for n in range(1, 11):
        await world.text(wrong(code, n))
    new = await lock(world, vm)
    assert not await troubles(world)
    await world.text(code)
    assert (await world.call("GET", f"/provision/{vm.app}")).body["paired"] is False
    await world.text(new)
    assert (await world.call("GET", f"/provision/{vm.app}")).body["paired"] is True
    await world.clock.advance(5)
    assert world.twilio.sent_to(ANN) == [ASKED, CONNECTED]


async def test_a_code_is_in_no_log_line_file_metric_or_trace_and_reaches_no_vm(world, caplog):
    vm, code = await unpaired(world, QUEUE_LIMIT=1, BACKFILL_S=60)
    await world.text(wrong(code), MessageSid="SM" + "1" * 32)
    await world.text(code, MessageSid="SM" + "2" * 32)
    gate = await world.occupies(vm, "busy")
    await world.text("waiting")
    await world.text(code)
    world.twilio.missed(ANN, code)
    world.twilio.missed(ANN, "one too many")
    await world.clock.advance(130)
    gate.open()
    await world.clock.advance(5)
    assert world.twilio.sent_to(ANN).count(CONNECTED) == 3, "by webhook twice, by the list once, though the queue was full"
    told = [(await world.call("GET", path)).text for path in (f"/messages/SM{'1' * 32}", f"/messages/SM{'2' * 32}", "/metrics", "/health", "/events", f"/provision/{vm.app}")]
    told += [str(vars(record)) for record in caplog.records] + world.twilio.sent_to(ANN) + [str(vm.asked)]
    await world.stop()
    told += [file.read_bytes().decode("latin-1") for file in world.file.parent.iterdir()]
    assert not [text for text in told if code in text or wrong(code) in text]


# Killed and starved at the door

async def test_a_code_whose_pairing_cannot_be_written_is_not_taken_and_pairs_when_it_comes_again(world):
    vm, code = await unpaired(world)
    in_the_way, sid = world.file.with_name("routes.json.tmp"), "SM" + "3" * 32
    in_the_way.mkdir()
    answer = await world.clock.run(world.twilio.texts(ANN, code, MessageSid=sid))
    assert answer.status == 503 and not world.rows("SELECT * FROM seen"), "the pairing is on disk before the code's SID is"
    in_the_way.rmdir()
    await world.clock.run(world.text(code, MessageSid=sid))
    await world.text("go")
    await world.hears(CONNECTED, "ran: go")


async def test_of_two_codes_in_one_moment_none_is_taken_before_the_pairing_is_written(world):
    vm, code = await unpaired(world)
    in_the_way = world.file.with_name("routes.json.tmp")
    in_the_way.mkdir()
    assert (await world.clock.run(world.twilio.texts(ANN, code))).status == 503
    answers = await world.clock.run(asyncio.gather(world.twilio.texts(ANN, code), world.twilio.texts(ANN, code)))
    assert [answer.status for answer in answers] == [503, 503] and not world.rows("SELECT * FROM seen")
    in_the_way.rmdir()
    await world.clock.run(asyncio.gather(*(world.text(body) for body in (code, code))))
    await world.hears(CONNECTED, CONNECTED)
    assert not vm.asked


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
async def test_a_kill_before_or_behind_the_write_of_a_pairing_ends_paired(world, written):
    vm, code = await unpaired(world)
    await world.clock.advance(5)
    before, sid = {file.name: file.read_bytes() for file in world.file.parent.iterdir()}, "SM" + "4" * 32
    await world.text(code, MessageSid=sid)
    await world.crash()
    for name, content in before.items():  # the files of the moment in between: Twilio got no answer
        if not (written and name == "routes.json"):
            world.file.with_name(name).write_bytes(content)
    heard = len(world.twilio.sent)
    await world.start()
    assert (await world.call("GET", f"/provision/{vm.app}")).body["paired"] is written
    await world.text(code, MessageSid=sid)
    await world.text("go")
    await world.clock.until(lambda: vm.ran)
    await world.clock.settle()
    assert world.twilio.sent_to(ANN)[heard:] == [CONNECTED, "ran: go"] and vm.ran == ["go"]


@beside
async def test_a_code_and_a_lock_survive_real_kills(live):
    child = await live.spawn()
    vm = await live.sign_up(verify=True)
    chance, codes = random.Random(5), []
    for n in range(2):
        codes.append((await live.ask("GET", f"/provision/{vm.app}")).body["pairing_code"])
        sid, taken = f"SM{n:032x}".replace("0", "e"), False
        texting = asyncio.ensure_future(live.twilio.texts(ANN, codes[-1], MessageSid=sid))
        await asyncio.sleep(chance.uniform(0, 0.012))
        await child.ends(signal.SIGKILL)
        await asyncio.gather(texting, return_exceptions=True)
        child = await live.spawn()
        while not taken:
            taken = (await live.twilio.texts(ANN, codes[-1], MessageSid=sid)).status == 200
        await live.text(f"go {n}")
        await live.clock.until(lambda: f"ran: go {n}" in live.twilio.sent_to(ANN))
        await live.text("cockpit lock")
        await child.ends(signal.SIGKILL)
        child = await live.spawn()
        await live.text("too late")
        await live.clock.until(lambda: live.twilio.sent_to(ANN).count(LOCKED) == n + 1)
    assert vm.ran == ["go 0", "go 1"] and len(set(codes)) == 2
    assert 2 <= live.twilio.sent_to(ANN).count(CONNECTED) <= 4


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
async def test_a_kill_before_or_behind_the_write_of_a_lock_by_text_ends_locked(world, written):
    vm = await paired(world)
    await world.clock.advance(5)
    before, sid = {file.name: file.read_bytes() for file in world.file.parent.iterdir()}, "SM" + "4" * 32
    await world.text("cockpit lock", MessageSid=sid)
    await world.crash()
    for name, content in before.items():  # the files of the moment in between: Twilio got no answer
        if not (written and name == "routes.json"):
            world.file.with_name(name).write_bytes(content)
    await world.start()
    await world.text("cockpit lock", MessageSid=sid)
    await world.text("not to be run")
    await world.clock.advance(5)
    assert world.saved["routes"][ANN]["pairing"] == "1:unpaired" and not vm.asked
    assert await code_of(world, vm)


async def test_an_owed_restart_of_a_vm_that_is_adopted_only_after_the_start_is_begun_then(world):
    vm = await world.ready()
    await world.clock.advance(5)
    await world.dies_owing("cockpit restart", "owes_restart\": true")
    world.loses_its_routes()
    world.fly.deaf = True
    await world.start()
    world.fly.deaf = False
    await world.clock.until(lambda: ANN in world.saved["routes"], 400)
    await world.text("behind it")
    await world.clock.until(lambda: vm.ran == ["behind it"], 60)
    assert world.fly.count("restart_machine") == 1
    assert {to for to, _ in world.twilio.sent} == {ANN}


async def test_an_opt_out_outlives_lost_routes_that_are_adopted_only_after_the_start(world):
    vm = await world.ready()
    await world.text("STOP")
    await world.stop()
    world.loses_its_routes()
    world.fly.deaf = True
    await world.start()
    world.fly.deaf = False
    await world.clock.until(lambda: ANN in world.saved["routes"], 400)
    assert (await world.call("POST", "/messages", key=vm.env["COCKPIT_TOKEN"], json={"text": "news"})).body["code"] == "wrong_state"


async def test_a_lock_by_the_page_killed_before_what_waits_is_dropped_lets_none_of_it_run(world):
    vm = await paired(world)
    vm.away = 503
    await world.text("one")
    await world.hears(CONNECTED, RESTARTING)
    await world.text("two")
    await world.crash()
    stored = world.saved
    stored["routes"][ANN]["pairing"] = "1:unpaired"
    world.file.write_text(json.dumps(stored))
    vm.away = 0
    await world.start()
    await world.clock.advance(100)
    assert world.twilio.sent_to(ANN) == [CONNECTED, RESTARTING, "Not run: 2 texts dropped."] and not vm.ran


async def test_a_restart_owed_at_a_start_is_done_before_what_the_start_finds_runs(world):
    vm = await world.ready(BACKFILL_S=60)
    await world.clock.advance(5)
    await world.text("cockpit queue")
    await world.clock.advance(5)
    await world.crash()
    with contextlib.closing(sqlite3.connect(world.database)) as database, database:  # the moment in which its SID is stored, its route not
        database.execute("UPDATE vms SET record = json_set(record, '$.owes_restart', json('true'))")
    world.twilio.missed(ANN, "found by the start")
    gate = world.fly.holds("restart_machine")
    await world.start()
    await world.clock.until(gate.arrived.is_set)
    await world.clock.advance(30)
    assert not vm.asked
    gate.open()
    await world.hears("Nothing is running.", "Your VM is being restarted. What waits will run when it is back.", "ran: found by the start")


# By Twilio's list

async def test_missed_texts_go_by_the_same_door_in_their_order(world):
    vm, code = await unpaired(world, BACKFILL_S=60)
    await world.stop()
    for body in ("before the code", code, "behind it"):
        world.clock.elapsed += 2
        world.twilio.missed(ANN, body)
    await world.start()
    await world.hears(ASKED, CONNECTED, "ran: behind it")
    await world.clock.advance(200)
    assert vm.ran == ["behind it"]


async def test_what_twilio_dates_before_the_pairing_is_not_run_though_it_is_found_behind_it(world):
    vm, code = await unpaired(world, BACKFILL_S=60)
    world.twilio.missed(ANN, "before")
    world.twilio.missed(ANN, "cockpit restart")
    await world.text(code)
    await world.clock.advance(3)
    world.twilio.missed(ANN, "behind")
    await world.clock.advance(200)
    assert vm.ran == ["behind"] and not world.fly.count("restart_machine")
    assert world.twilio.sent_to(ANN) == [CONNECTED, "ran: behind"]


async def test_what_twilio_dates_between_a_lock_and_the_next_code_is_not_run(world):
    vm = await paired(world, BACKFILL_S=600)
    new = await lock(world, vm)
    await world.clock.advance(3)
    world.twilio.missed(ANN, "meanwhile")
    await world.clock.advance(3)
    await world.text(new)
    await world.clock.advance(3)
    world.twilio.missed(ANN, "behind")
    await world.clock.advance(700)
    assert vm.ran == ["behind"]


# Locking

async def by_text(world, vm: FakeVM) -> None:
    await world.text("Cockpit LOCK")


@pytest.mark.parametrize("how", [by_text, lock])
async def test_a_lock_drops_what_waits_at_once_and_lets_what_runs_answer(world, how):
    vm = await paired(world)
    gate = await world.occupies(vm, "running")
    await world.text("waiting 1")
    await world.text("waiting 2")
    await how(world, vm)
    heard = [CONNECTED, LOCKED, "Not run: 2 texts dropped."]
    await world.hears(*heard)
    await world.text("not run")
    await world.hears(*heard, ASKED)
    gate.open()
    await world.hears(*heard, ASKED, "ran: running")
    await world.text(await code_of(world, vm))
    await world.text("again")
    await world.hears(*heard, ASKED, "ran: running", CONNECTED, "ran: again")
    assert vm.ran == ["running", "again"] and world.saved["routes"][ANN]["pairing"] == "1:paired"


async def test_while_locked_status_and_help_work_and_nothing_else_does(world):
    vm = await paired(world)
    await world.text("cockpit lock")
    await world.text("cockpit status")
    await world.text("cockpit help")
    await world.hears(CONNECTED, LOCKED, "Your VM is locked. Nothing is running. 0 waiting.", cockpit.COMMANDS_HELP)
    code = await code_of(world, vm)
    for verb in ("restart", "queue", "cancel", "lock"):
        await world.text(f"cockpit {verb}")
    await world.hears(CONNECTED, LOCKED, "Your VM is locked. Nothing is running. 0 waiting.", cockpit.COMMANDS_HELP, ASKED)
    assert await code_of(world, vm) == code and not world.fly.count("restart_machine")
    assert (await unasked(world, vm, text="what ran tells of itself")).status == 202


async def test_a_lock_delivered_again_does_not_lock_again(world):
    vm = await paired(world)
    sid = "SM" + "8" * 32
    await world.text("cockpit lock", MessageSid=sid)
    await world.text(await code_of(world, vm))
    gate = await world.occupies(vm, "one")
    await world.text("two")
    await world.text("cockpit lock", MessageSid=sid)
    gate.open()
    await world.clock.until(lambda: len(vm.ran) == 2)
    await world.restart()
    assert world.saved["routes"][ANN]["pairing"] == "1:paired" and vm.ran == ["one", "two"]


async def test_a_lock_by_the_page_answers_with_a_new_code_in_any_state(world):
    vm, code = await unpaired(world)
    first, second = await lock(world, vm), await lock(world, vm)
    assert len({code, first, second}) == 3 and await code_of(world, vm) == second
    await world.text(second)
    await lock(world, vm)
    await world.hears(CONNECTED, LOCKED)
    await world.restart()
    await world.text(second)
    await world.hears(CONNECTED, LOCKED, ASKED)
    machine = next(iter(world.fly.apps[vm.app].machines))
    assert (await world.call("POST", f"/provision/{machine}/lock")).body["vm_id"] == vm.app
    assert (await world.call("POST", "/provision/nobody/lock")).status == 404
    assert (await world.call("POST", f"/provision/{vm.app}/lock", key=None)).status == 401


async def test_a_vm_that_never_wanted_a_code_can_be_locked_too(world):
    vm = await world.ready()
    await world.text("hello")
    await world.hears("ran: hello")
    await world.text("cockpit lock")
    await world.text("cockpit status")
    await world.hears("ran: hello", LOCKED, "Your VM is locked. Nothing is running. 0 waiting.")
    await world.text(await code_of(world, vm))
    await world.text("again")
    await world.clock.until(lambda: vm.ran == ["hello", "again"])


@pytest.mark.parametrize("how", [by_text, lock])
async def test_a_lock_at_any_turn_of_a_hand_over_lets_that_text_answer_and_the_next_not_run(world, how):
    """The lock comes some turns of the event loop behind two texts: at every await of the first one's hand-over, its answer and the next, until it comes too late."""
    vm, cut_short, too_late = await paired(world), 0, 0
    for turns in itertools.takewhile(lambda turns: too_late < 5, range(0, 100, 2)):
        vm.ran.clear()
        world.twilio.messages.clear()
        texts = [asyncio.ensure_future(world.text(body)) for body in ("one", "two")]
        for _ in range(turns):
            await asyncio.sleep(0)
        await how(world, vm)
        ran_by_then = len([command for command in vm.asked if command.text in ("one", "two")])
        await world.text("three")
        await world.clock.run(asyncio.gather(*texts))
        await world.clock.advance(30)
        assert vm.ran in ([], ["one"], ["two"], ["one", "two"]), turns
        assert len([command for command in vm.asked if command.text in ("one", "two")]) == ran_by_then, f"run behind the lock ({turns})"
        heard = world.twilio.sent_to(ANN)
        assert [body for body in heard if body.startswith("ran: ")] == [f"ran: {body}" for body in vm.ran], turns
        dropped = sum(int(body.split()[2]) for body in heard if body.startswith("Not run: "))
        assert LOCKED in heard and dropped + len(vm.ran) <= 2, turns
        cut_short += 0 < len(vm.ran) < 2 or dropped > 0
        too_late = too_late + 1 if heard[:2] == ["ran: one", "ran: two"] else 0
        vm.asked.clear()
        await world.clock.advance(3600)
        await world.text(await code_of(world, vm))
        await world.clock.advance(5)
    assert cut_short, "some lock came between the two"


@pytest.mark.parametrize("how", [by_text, lock])
@pytest.mark.parametrize("where", ["at work", "cut", "cut and away", "refused", "busy", "away"])
async def test_a_lock_wherever_a_hand_over_waits_lets_only_what_reached_its_vm_answer(world, how, where):
    vm = await paired(world)
    reached, gate = where in ("at work", "cut", "cut and away"), None
    if where == "at work":
        gate = vm.holds()
    elif where == "cut":
        gate = world.vms.holds("health")  # which is asked behind a cut
        vm.then({"cut": "after"})
    elif where == "cut and away":
        vm.then({"cut": "after"})
        vm.answer = lambda text: setattr(vm, "away", 503) or {"text": f"ran: {text}"}
    vm.away, vm.busy = 503 * (where in ("refused", "away")), where == "busy"
    await world.text("one")
    await world.clock.until(gate.arrived.is_set if gate else lambda: vm.asked)
    if where.endswith("away"):
        await world.hears(CONNECTED, RESTARTING)
    await world.text("two")
    await how(world, vm)
    vm.away, vm.busy = 0, False
    gate and gate.open()
    await world.clock.advance(200)
    heard = world.twilio.sent_to(ANN)
    assert LOCKED in heard and vm.ran == ["one"] * reached and ("ran: one" in heard) == reached
    assert sum(int(body.split()[2]) for body in heard if body.startswith("Not run: ")) == 2 - reached


async def test_the_door_wakes_no_sleeper_and_the_first_text_that_is_run_does(world):
    vm, code = await unpaired(world, VM_IDLE_S=IDLE)
    await falls_asleep(world, vm)
    for body in ("hello", wrong(code), code, "cockpit lock"):
        await world.text(body)
    await world.hears(ASKED, CONNECTED, LOCKED)
    await world.text("cockpit status")
    await world.text(await code_of(world, vm))
    await world.clock.advance(5)
    assert not world.fly.count("start_machine") and machine_of(world, vm) == "suspended"
    await world.text("go")
    await world.clock.until(lambda: vm.ran == ["go"])


@pytest.mark.parametrize("how", [by_text, lock])
async def test_a_lock_while_its_vm_wakes_lets_nothing_run_and_promises_nothing(world, how):
    vm = await paired(world, VM_IDLE_S=IDLE)
    await falls_asleep(world, vm)
    world.fly.resume_s = 8
    await world.text("wake up")
    await world.clock.advance(2)
    await how(world, vm)
    await world.clock.advance(30)
    assert world.twilio.sent_to(ANN) == [CONNECTED, LOCKED, "Not run: 1 text dropped."] and not vm.asked


# What Fly holds

async def test_a_stamp_follows_its_pairing_and_again_until_fly_took_it(world):
    vm, code = await unpaired(world, RECONCILE_S=EVERY)
    (machine,) = world.fly.machines
    assert machine.config["metadata"]["cockpit_pairing"] == "0:unpaired"
    await world.text(code)
    await world.clock.advance(3)
    assert machine.config["metadata"].items() >= stamp(vm.app, ANN, world.saved["gateway_id"]).items()
    world.fly.fails("set_metadata", 400, times=3)
    await lock(world, vm)
    await world.clock.advance(3)
    assert machine.config["metadata"]["cockpit_pairing"] == "0:paired", "Fly refused it"
    await sweeps(world, 6)
    assert machine.config["metadata"].items() >= stamp(vm.app, ANN, world.saved["gateway_id"], pairing="1:unpaired").items()
    await lock(world, vm)
    await world.clock.advance(3)
    assert machine.config["metadata"]["cockpit_pairing"] == "2:unpaired", "without a sweep"


async def test_a_stamp_overtaken_by_the_next_pairing_ends_as_the_route_says(world):
    vm, code = await unpaired(world)
    gate = world.fly.holds("set_metadata")
    await world.text(code)
    await world.clock.until(gate.arrived.is_set)
    new = await lock(world, vm)
    await world.text(new)
    await lock(world, vm)
    gate.open()
    await world.clock.advance(30)
    (machine,) = world.fly.machines
    assert machine.config["metadata"].items() >= stamp(vm.app, ANN, world.saved["gateway_id"], pairing="2:unpaired").items()


async def test_a_lock_during_a_rotation_stands_in_the_stamp_that_goes_with_it(world):
    vm = await paired(world)
    await world.clock.advance(5)
    gate = world.fly.holds("set_secrets")
    rotating = asyncio.ensure_future(world.ask("PATCH", f"/provision/{vm.app}", json={"github_token": "ghp_another"}))
    await world.clock.until(gate.arrived.is_set)
    await lock(world, vm)
    await world.clock.advance(5)
    gate.open()
    assert (await world.clock.run(rotating)).body["pairing_code"]
    (machine,) = world.fly.machines
    assert machine.config["metadata"].items() >= stamp(vm.app, ANN, world.saved["gateway_id"], pairing="1:unpaired").items()


@pytest.mark.parametrize("setting", ["off", "on"])
@pytest.mark.parametrize("pairing", ["2:unpaired", "3:paired"])
async def test_a_lost_disk_takes_over_what_a_verifying_stamp_says_whatever_the_setting(world, setting, pairing):
    vm = await world.ready(VERIFY_PHONE=setting)
    await world.clock.advance(5)
    gateway_id = world.saved["gateway_id"]
    await world.stop()
    (machine,) = world.fly.machines
    machine.config["metadata"] |= stamp(vm.app, ANN, gateway_id, pairing=pairing)
    for file in world.file.parent.iterdir():
        file.unlink()
    await world.start()
    assert world.saved["routes"][ANN]["pairing"] == pairing
    await world.text("hello")
    if pairing == "3:paired":
        return await world.hears("ran: hello")
    await world.hears(ASKED)
    await world.text(await code_of(world, vm))
    await world.hears(ASKED, CONNECTED)
    assert not vm.asked


async def test_a_vm_that_rewrites_its_pairing_proves_nothing_and_is_not_adopted(world):
    vm, _ = await unpaired(world)
    await world.clock.advance(5)
    await world.stop()
    (machine,) = world.fly.machines
    machine.config["metadata"]["cockpit_pairing"] = "0:paired"
    for file in world.file.parent.iterdir():
        file.unlink()
    await world.start()
    await world.text("hello")
    assert not world.saved.get("routes") and not vm.asked


async def test_what_was_refused_before_a_lost_disk_is_not_run_behind_it(world):
    vm, code = await unpaired(world, BACKFILL_S=60)
    await world.text("before the code")
    await world.clock.advance(3)
    await world.text(code)
    await world.clock.advance(3)
    await world.text("behind it")
    await world.hears(ASKED, CONNECTED, "ran: behind it")
    await world.clock.advance(5)
    await world.stop()
    for file in world.file.parent.iterdir():
        file.unlink()
    await world.start()
    await world.clock.advance(200)
    assert vm.ran == ["behind it"]


@pytest.mark.parametrize("which", [0, 1])
async def test_codes_of_both_secrets_count_while_two_are_set(world, which):
    vm, old = await unpaired(world)
    await world.restart(COCKPIT_SECRET=f"{'another-root-' * 4},{SECRET}")
    new = await code_of(world, vm)
    assert new != old
    await world.text((old, new)[which])
    await world.hears(CONNECTED)


async def test_a_code_of_a_secret_that_is_gone_does_not_count(world):
    vm, old = await unpaired(world)
    await world.restart(COCKPIT_SECRET="another-root-" * 4)
    await world.text(old)
    await world.hears(ASKED)


# --- Fleet ---

EVERY, STAMP = 9, "cockpit.example.com/"  # a short pause between sweeps is quickly passed in virtual time


async def stream(world, *, cut_after: str = "", **more) -> list[tuple[str, Any]]:
    """The events of a provisioning that is streamed; comments count as events named ':'. It may hang up after an event."""
    told, headers = [], {"Authorization": f"Bearer {KEY}", "Accept": "text/event-stream"}
    async with world.session.post(world.twilio.gateway + "/provision", json=sign_up_form(**more), headers=headers) as response:
        assert response.status == 200 and response.content_type == "text/event-stream", await response.text()
        event = ""
        async for line in response.content:
            world.clock.touch()
            words = line.decode().rstrip("\n")
            if words.startswith((":", "data: ")):
                told.append((":", words) if words.startswith(":") else (event, json.loads(words[6:])))
                if event == cut_after:
                    break
            event = words.removeprefix("event: ") if words.startswith("event: ") else event
    return told


async def test_a_streamed_sign_up_tells_each_step_with_its_seconds_and_then_the_record(world):
    world.fly.boot_s = 40
    await world.start()
    told = await world.clock.run(stream(world))
    assert [data["step"] for event, data in told if event == "step"] == ["app", "secrets", "address", "volume", "machine", "start", "health"]
    assert told[-1][0] == "ready" and told[-1][1]["state"] == "ready"
    assert [event for event, _ in told].count(":") == 2  # a comment line every 15 s of silence
    steps = (await world.call("GET", f"/provision/{told[-1][1]['vm_id']}")).body["steps"]
    assert steps == {data["step"]: data["seconds"] for event, data in told if event == "step"} and 40 <= steps["start"] < 45


async def test_a_streamed_sign_up_that_fails_ends_with_the_problem(world):
    world.fly.fails("create_machine", 422, body={"error": "the moon is wrong"})
    await world.start()
    event, told = (await world.clock.run(stream(world)))[-1]
    assert (event, told["code"], told["status"]) == ("failed", "fly_rejected", 502) and "the moon is wrong" in told["detail"]


async def test_a_dropped_stream_does_not_stop_the_work(world):
    await world.start()
    await world.clock.run(stream(world, cut_after="step"))
    await world.clock.until(lambda: world.saved["routes"].get(ANN, {}).get("state") == "ready")


async def test_a_sign_up_need_not_be_waited_for(world):
    gate = world.fly.holds("create_machine")
    await world.start()
    answer = await world.call("POST", "/provision", json=sign_up_form(), headers={"Prefer": "respond-async"})
    assert answer.status == 202 and answer.headers["Location"] == f"/provision/{answer.body['vm_id']}" and answer.body["state"] == "provisioning"
    assert world.saved["routes"][ANN]["vm_id"] == answer.body["vm_id"]
    await world.clock.until(gate.arrived.is_set)
    assert (await world.call("GET", answer.headers["Location"])).body["step"] == "machine"
    gate.open()
    await world.clock.until(lambda: world.saved["routes"][ANN]["state"] == "ready")


@pytest.mark.parametrize("gigabytes", [0, 3])
async def test_a_full_region_is_passed_over_for_the_next(world, gigabytes):
    world.fly.full = {"iad"}
    await world.start(VM_REGION="iad,ewr", VM_VOLUME_GB=gigabytes)
    answer = await world.provision()
    assert answer.status == 201 and answer.body["region"] == "ewr"
    assert len(world.fly.apps) == 1 and [volume["region"] for volume in world.fly.apps[answer.body["vm_id"]].volumes.values()] == ["ewr"] * bool(gigabytes)


@pytest.mark.parametrize("status, error", [(400, "no capacity"), (403, "which is over the allowed quota. please consider other regions"),
                                           (412, "insufficient resources to create new machine with existing volume"), (409, "aborted: insufficient memory")])
async def test_a_volume_beside_which_no_machine_fits_moves_on_with_it(world, status, error):
    world.fly.fails("create_machine", status, body={"error": error})
    await world.start(VM_REGION="iad,ewr", VM_VOLUME_GB=3)
    vm = await world.sign_up()
    assert [volume["region"] for volume in world.fly.apps[vm.app].volumes.values()] == ["ewr"] and world.fly.machines[0].region == "ewr"


@pytest.mark.parametrize("gigabytes", [0, 3])
async def test_when_all_regions_are_full_that_is_told_with_a_time_and_nothing_stays(world, gigabytes):
    world.fly.full = {"iad", "ewr"}
    await world.start(VM_REGION="iad,ewr", VM_VOLUME_GB=gigabytes)
    answer = await world.provision()
    assert (answer.status, answer.body["code"]) == (503, "no_capacity") and int(answer.headers["Retry-After"]) > 0
    await world.clock.until(lambda: not world.fly.apps)


async def test_a_region_asked_for_is_the_only_one_tried(world):
    world.fly.full = {"iad"}
    await world.start(VM_REGION="iad,ewr")
    assert (await world.provision(region="iad")).body["code"] == "no_capacity"
    assert {call.body["region"] for call in world.fly.calls("create_machine")} == {"iad"}


async def test_rotating_changes_only_what_is_given_and_texts_wait_meanwhile(world):
    await world.start()
    vm = await world.sign_up()
    before, machine = dict(vm.env), world.fly.machines[0]
    gate = world.fly.holds("update_machine")
    patch = asyncio.ensure_future(world.ask("PATCH", f"/provision/{vm.app}", json={"github_token": "ghp_new"}))
    await world.clock.until(gate.arrived.is_set)
    await world.text("hello")
    await world.clock.advance(30)
    assert not vm.ran and (await world.call("GET", f"/provision/{vm.app}")).body["state"] == "away"
    gate.open()
    answer = await world.clock.run(patch)
    assert answer.status == 200 and answer.body["state"] == "ready", answer.text
    assert vm.env == before | {"GITHUB_TOKEN": "ghp_new"}
    config = world.fly.calls("update_machine")[-1].body["config"]
    assert config == machine.config and config["services"] and config["metadata"]["cockpit_phone"] == ANN
    await world.hears("ran: hello")


async def test_rotating_lets_a_running_text_end_first(world):
    await world.start()
    vm = await world.sign_up()
    gate = vm.holds()
    await world.text("long")
    await gate.arrived.wait()
    patch = asyncio.ensure_future(world.ask("PATCH", f"/provision/{vm.app}", json={"api_keys": {"NEW_KEY": "value"}}))
    await world.clock.advance(5)
    assert not world.fly.count("update_machine")
    gate.open()
    assert (await world.clock.run(patch)).status == 200 and vm.env["NEW_KEY"] == "value"
    await world.hears("ran: long")


async def test_rotating_renews_the_vm_s_token_with_the_secret_that_signs_now(world):
    await world.start()
    vm = await world.sign_up()
    await world.clock.advance(5)
    newer = "a-newer-root-of-tokens-0123456789abcdef"
    await world.restart(COCKPIT_SECRET=f"{newer},{SECRET}")
    await world.text("old token")
    await world.hears("ran: old token")
    assert (await world.call("PATCH", f"/provision/{vm.app}", json={"github_token": "ghp_new"})).status == 200
    await world.text("new token")
    await world.hears("ran: old token", "ran: new token")
    await world.restart(COCKPIT_SECRET=newer)
    await world.text("the only secret")
    await world.hears("ran: old token", "ran: new token", "ran: the only secret")


async def test_a_vm_that_holds_the_other_secret_s_token_is_found_out_once(world):
    """A rotation was killed after Fly took the secrets and before the route said so."""
    newer = "a-newer-root-of-tokens-0123456789abcdef"
    vm = await world.ready()
    await world.clock.advance(5)
    await world.restart(COCKPIT_SECRET=f"{newer},{SECRET}")
    mark = base64.urlsafe_b64encode(hmac.digest(newer.encode(), f"vm:{vm.app}".encode(), "sha256")).decode().rstrip("=")
    vm.env["COCKPIT_TOKEN"] = f"{vm.app}.{mark}"
    await world.text("one")
    await world.text("two")
    await world.hears("ran: one", "ran: two")
    assert world.vms.objections == ["command: not this VM's token"]
    world.vms.objections.clear()
    vm.env["COCKPIT_TOKEN"] = "of nobody"
    await world.text("three")
    await world.clock.until(lambda: len(world.twilio.sent) == 3)
    assert world.twilio.sent_to(ANN)[2] == 'Your VM answered with an error (401): "three"'
    assert len(world.vms.objections) == 2
    world.vms.objections.clear()


@pytest.mark.parametrize("body, field", [({}, "github_token"), ({"phone_number": BOB}, "phone_number"), ({"github_token": ""}, "github_token"), ({"api_keys": {"PATH": "x"}}, "api_keys.PATH")])
async def test_a_rotation_of_nothing_or_of_anything_else_is_refused(world, body, field):
    await world.start()
    vm = await world.sign_up()
    answer = await world.call("PATCH", f"/provision/{vm.app}", json=body)
    assert answer.status == 422 and field in [error["field"] for error in answer.body["errors"]] and not world.fly.count("update_machine")


async def test_a_restart_returns_when_the_vm_is_well_again(world):
    world.fly.boot_s = 5
    await world.start()
    vm = await world.sign_up()
    began = world.clock.elapsed
    answer = await world.call("POST", f"/provision/{world.fly.machines[0].id}/restart")
    assert answer.status == 200 and answer.body["vm_id"] == vm.app and answer.body["last_error"] is None
    assert world.fly.count("restart_machine") == 1 and world.clock.elapsed - began >= 5


@pytest.mark.parametrize("what", ["restart", "upgrade"])
async def test_what_is_not_ready_is_not_changed(world, what):
    await world.start()
    gate, job = await world.begin(world.fly, "create_machine")
    vm_id = world.saved["routes"][ANN]["vm_id"]
    answer = await world.call("POST", f"/provision/{vm_id}/{what}")
    assert (answer.status, answer.body["code"]) == (409, "wrong_state")
    gate.open()
    await world.clock.run(job)
    gate = world.fly.holds("get_machine")
    first = asyncio.ensure_future(world.ask("POST", f"/provision/{vm_id}/restart"))
    await world.clock.until(gate.arrived.is_set)
    assert (await world.call("POST", f"/provision/{vm_id}/{what}")).body["code"] == "wrong_state"
    gate.open()
    assert (await world.clock.run(first)).status == 200
    assert (await world.call("POST", f"/provision/cockpit-vm-unknown/{what}")).body["code"] == "unknown_vm"


async def test_an_upgrade_moves_a_vm_to_the_present_image(world):
    await world.start()
    vm = await world.sign_up()
    await world.clock.advance(5)
    await world.restart(VM_IMAGE="vm-image:8")
    answer = await world.call("POST", f"/provision/{vm.app}/upgrade")
    assert answer.status == 200 and answer.body["image"] == "vm-image:8" == world.fly.machines[0].config["image"]
    assert vm.env["GITHUB_TOKEN"] == GITHUB and world.saved["routes"][ANN]["image"] == "vm-image:8"


async def test_an_image_that_is_not_healthy_is_taken_back(world):
    await world.start()
    vm = await world.sign_up()
    await world.clock.advance(5)
    await world.restart(VM_IMAGE="vm-image:8", PROVISION_TIMEOUT_S=20)
    vm.started = lambda: False
    is_up = lambda: world.fly.machines[0].config["image"] == "vm-image:7"
    boot = world.vms.boot
    world.vms.boot = lambda app, started, env: boot(app, is_up, env)
    answer = await world.call("POST", f"/provision/{vm.app}/upgrade")
    assert (answer.status, answer.body["code"]) == (504, "vm_unhealthy") and "vm-image:7" in answer.body["detail"]
    record = (await world.call("GET", f"/provision/{vm.app}")).body
    assert record["image"] == "vm-image:7" and record["state"] == "ready" and "vm-image:8" in record["last_error"]
    await world.text("still here")
    await world.hears("ran: still here")


async def test_a_teardown_ends_a_change(world):
    await world.start(PROVISION_TIMEOUT_S=3000)
    vm = await world.sign_up()
    vm.away = 503
    change = asyncio.ensure_future(world.ask("POST", f"/provision/{vm.app}/restart"))
    await world.clock.advance(5)
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    assert (await world.clock.run(change)).body["code"] == "torn_down" and not world.saved["routes"]


async def test_what_waits_for_a_change_is_told_of_once_when_its_vm_is_torn_down(world):
    vm = await world.ready(PROVISION_TIMEOUT_S=3000)
    vm.away = 503
    change = asyncio.ensure_future(world.ask("POST", f"/provision/{vm.app}/restart"))
    await world.clock.advance(5)
    await world.text("one")
    teardowns = asyncio.gather(*(world.ask("DELETE", f"/provision/{vm.app}") for _ in range(2)))
    assert [answer.status for answer in await world.clock.run(teardowns)] == [204] * 2
    await world.clock.run(change)
    await world.hears('Your VM is gone. Not run: "one" Sign up: https://signup.example.com')
    another = await world.sign_up()
    await world.text("two")
    await world.clock.until(lambda: another.ran == ["two"])


CHANGES = {"restart": ("POST", {}), "upgrade": ("POST", {}), "rotate": ("PATCH", {"json": {"github_token": "ghp_new"}})}
CHANGE_CALLS = ["get_machine", "restart_machine", "set_secrets", "update_machine", "wait_machine"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", CHANGE_CALLS)
@pytest.mark.parametrize("what", CHANGES)
async def test_a_change_killed_anywhere_is_ended_by_the_next_start(world, what, call, after):
    vm = await world.ready(COCKPIT_SECRET=SECRET)
    await world.clock.advance(5)
    newer = "a-newer-root-of-tokens-0123456789abcdef"
    await world.restart(VM_IMAGE="vm-image:8", COCKPIT_SECRET=f"{newer},{SECRET}", RECONCILE_S=60)
    gate = world.fly.holds(call, after=after)
    method, more = CHANGES[what]
    path = f"/provision/{vm.app}" + ("" if what == "rotate" else f"/{what}")
    asked = asyncio.ensure_future(world.ask(method, path, **more))
    with contextlib.suppress(AssertionError):
        await world.clock.until(lambda: gate.arrived.is_set() or asked.done(), 60)
    await world.crash_and_restart()
    await asyncio.gather(asked, return_exceptions=True)
    await world.clock.advance(200)
    record = (await world.call("GET", f"/provision/{vm.app}")).body
    route = world.saved["routes"][ANN]
    assert record["state"] == "ready" and "change" not in route
    assert record["image"] == world.fly.machines[0].config["image"]
    await world.text("still mine")
    await world.hears("ran: still mine")


async def test_an_upgrade_killed_on_a_bad_image_goes_back(world):
    vm = await world.ready()
    await world.clock.advance(5)
    await world.restart(VM_IMAGE="vm-image:8", PROVISION_TIMEOUT_S=20)
    is_up = lambda: world.fly.machines[0].config["image"] == "vm-image:7"
    boot = world.vms.boot
    world.vms.boot = lambda app, started, env: boot(app, is_up, env)
    gate = world.fly.holds("update_machine", after=True)
    asked = asyncio.ensure_future(world.ask("POST", f"/provision/{vm.app}/upgrade"))
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart()
    await asyncio.gather(asked, return_exceptions=True)
    await world.clock.advance(100)
    record = (await world.call("GET", f"/provision/{vm.app}")).body
    assert record["image"] == world.fly.machines[0].config["image"] == "vm-image:7"
    assert "vm-image:8" in record["last_error"]
    await world.text("still here")
    await world.hears("ran: still here")


async def test_a_sign_up_answered_202_and_undone_by_a_start_stays_readable(world):
    await world.start()
    gate = world.fly.holds("create_machine", after=True)
    answer = await world.call("POST", "/provision", json=sign_up_form(), headers={"Prefer": "respond-async"})
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart()
    await world.clock.until(lambda: not world.fly.everything)
    record = (await world.call("GET", f"/provision/{answer.body['vm_id']}")).body
    assert record["state"] == "failed" and "restarted" in record["last_error"]
    await world.clock.advance(3700)
    assert (await world.call("GET", f"/provision/{answer.body['vm_id']}")).status == 404


# Reconciling

async def sweeps(world, times: int = 1) -> None:
    """So many sweeps, and whatever they set going."""
    before, every = world.fly.count("org_machines"), int(world.environ["RECONCILE_S"])
    await world.clock.advance(every * times + 1)
    assert world.fly.count("org_machines") >= before + times


async def troubles(world) -> str:
    return " | ".join((await world.call("GET", "/health")).body["troubles"])


def ours(world) -> str:
    return STAMP + world.saved["gateway_id"]


async def test_a_foreign_machine_with_our_prefix_survives_every_sweep(world):
    await world.start(RECONCILE_S=EVERY)
    mine = await world.sign_up()
    for name, gateway in (("cockpit-vm-aaaaaaaa", STAMP + "another0"), ("cockpit-vm-bbbbbbbb", "staging.example.com/" + world.saved["gateway_id"])):
        world.fly.plants(name, **stamp(name, BOB, world.saved["gateway_id"]) | {"cockpit_gateway": gateway})
    world.fly.plants("cockpit-vm-cccccccc")
    world.fly.plants("cockpit-vm-dddddddd", machines=0)
    await sweeps(world, 30)
    assert set(world.fly.apps) == {mine.app, *(f"cockpit-vm-{letter * 8}" for letter in "abcd")} and set(world.saved["routes"]) == {ANN}
    told = await troubles(world)
    assert all(f"cockpit-vm-{letter * 8}" in told for letter in "abcd")


async def test_a_vm_that_proves_its_owner_is_adopted_after_two_sweeps(world):
    await world.start(RECONCILE_S=EVERY)
    vm = await world.sign_up()
    kept = world.saved
    await world.stop()
    world.file.write_text(json.dumps(kept | {"routes": {BOB: kept["routes"][ANN] | {"vm_id": "cockpit-vm-elsewhere", "machine_id": "m"}}}))
    world.file.with_name("routes.json.bak").unlink()
    await world.start()
    await sweeps(world, 1)
    assert ANN not in world.saved["routes"]
    await sweeps(world, 1)
    own = ("steps", "awake_since")
    assert without(world.saved["routes"][ANN], *own) == without(kept["routes"][ANN], *own)
    await world.text("hello again")
    await world.hears("ran: hello again")
    assert vm.ran == ["hello again"]


async def test_a_destroyed_machine_that_proves_its_owner_is_not_adopted(world):
    await world.start(RECONCILE_S=EVERY)
    name = "cockpit-vm-elsewhere"
    world.fly.plants(name, **stamp(name, BOB, world.saved["gateway_id"]))
    for machine in world.fly.everything[name].machines.values():
        machine.rest = "destroyed"
    await sweeps(world, 4)
    assert not world.saved["routes"]
    assert name in world.fly.apps


async def test_what_was_torn_down_within_the_hour_is_not_adopted(world):
    await world.start(RECONCILE_S=600)
    vm = await world.sign_up()
    ghost, metadata = vm.app, world.fly.machines[0].config["metadata"]
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    world.fly.plants(ghost, **metadata)
    await sweeps(world, 4)
    assert not world.saved["routes"] and ghost in world.fly.apps


async def test_two_that_claim_one_number_are_left_alone_and_named_masked(world):
    await world.start(RECONCILE_S=EVERY)
    await world.sign_up()
    for name in ("cockpit-vm-claim001", "cockpit-vm-claim002"):
        world.fly.plants(name, **stamp(name, BOB, world.saved["gateway_id"]))
    await sweeps(world, 10)
    assert len(world.fly.apps) == 3 and set(world.saved["routes"]) == {ANN}
    told = await troubles(world)
    assert cockpit.mask_phone(BOB) in told and BOB not in told


NONSENSE = [("list_apps", {"foo": 1}), ("list_apps", []), ("list_apps", {"apps": [1]}), ("org_machines", {"foo": 1}), ("org_machines", []),
            ("org_machines", {"machines": [{"id": 7}]}), ("org_machines", {"machines": [], "error_regions": ["iad"]})]


@pytest.mark.parametrize("call, answer", [
    ("org_machines", {"machines": [{"id": "m", "state": "started", "config": {"guest": {"memory_mb": float("inf")}}}]}),
    ("get_machine", {"id": "m", "state": "started", "config": {"guest": {"memory_mb": float("inf")}}})])
async def test_a_number_without_an_end_does_not_end_the_adoption(world, call, answer):
    vm = await world.ready()
    await world.clock.advance(10)
    await world.stop()
    world.loses_its_routes()
    world.fly.fails(call, 200, 20, body=answer)
    await world.start()
    await world.clock.advance(60)
    world.fly.heals(call)
    await world.clock.advance(300)
    assert ANN in world.saved["routes"] and vm.app in world.fly.apps


async def test_a_version_of_secrets_without_an_end_is_no_fault_of_ours(world):
    await world.start()
    world.fly.fails("set_secrets", 200, 1000, body={"version": float("inf")})
    answer = await world.provision()
    assert (answer.status, answer.body["code"]) == (503, "fly_unavailable")


@pytest.mark.parametrize("call, answer", NONSENSE)
async def test_an_answer_from_fly_that_makes_no_sense_deletes_nothing(world, call, answer):
    await world.start(RECONCILE_S=EVERY, PROVISION_TIMEOUT_S=10)
    vm = await world.sign_up()
    world.fly.plants("cockpit-vm-orphaned", cockpit_gateway=ours(world))
    await world.clock.advance(2)
    world.fly.fails(call, 200, times=1000, body=answer)
    await world.clock.advance(200)
    assert set(world.fly.apps) == {vm.app, "cockpit-vm-orphaned"} and world.saved["routes"][ANN]["state"] == "ready"
    assert not world.fly.count("delete_app") and await troubles(world)
    world.fly.heals(call)
    await sweeps(world, 3)
    assert set(world.fly.apps) == {vm.app, "cockpit-vm-orphaned"} and "fly apps destroy cockpit-vm-orphaned" in await troubles(world)


@pytest.mark.parametrize("call, status", [("list_apps", 500), ("org_machines", 503), ("get_machine", 500), ("get_app", 500)])
async def test_fly_out_of_reach_changes_nothing(world, call, status):
    await world.start(RECONCILE_S=EVERY, PROVISION_TIMEOUT_S=10)
    vm = await world.sign_up()
    world.fly.plants("cockpit-vm-orphaned", cockpit_gateway=ours(world))
    world.fly.fails(call, status, times=10000)
    await world.clock.advance(100)
    assert set(world.fly.apps) == {vm.app, "cockpit-vm-orphaned"} and world.saved["routes"][ANN]["state"] == "ready"


async def test_a_machine_whose_host_is_not_well_is_left_alone(world):
    await world.start(RECONCILE_S=EVERY, PROVISION_TIMEOUT_S=10)
    vm = await world.sign_up()
    world.fly.rests(vm, "stopped")
    orphan = world.fly.plants("cockpit-vm-orphaned", cockpit_gateway=ours(world))
    for machine in world.fly.machines:
        machine.host = "unreachable"
    await sweeps(world, 5)
    assert orphan.name in world.fly.apps and not world.fly.count("start_machine")
    assert (await world.call("POST", f"/provision/{vm.app}/restart")).body["code"] == "fly_unavailable" and not world.fly.count("restart_machine")


async def test_a_vm_that_vanished_fails_its_owner_is_told_once_and_the_number_is_free(world):
    await world.start(RECONCILE_S=EVERY)
    vm = await world.sign_up()
    world.fly.everything.pop(vm.app)
    world.vms.gone(vm.app)
    await sweeps(world, 5)
    assert world.saved["routes"][ANN]["state"] == "failed"
    await world.hears("Your VM is gone. Sign up: https://signup.example.com")
    await world.restart()
    await sweeps(world, 2)
    await world.hears("Your VM is gone. Sign up: https://signup.example.com")
    assert (await world.provision()).status == 201


async def test_a_text_to_a_vm_that_vanished_is_told_of_though_it_was_fetched(world):
    vm = await world.ready(RECONCILE_S=EVERY, BACKFILL_S=60)
    world.fly.everything.pop(vm.app)
    world.vms.gone(vm.app)
    await sweeps(world, 5)
    assert (await world.text("by webhook")).said == ""
    world.twilio.missed(ANN, "by the list")
    await world.hears("Your VM is gone. Sign up: https://signup.example.com",
                      *(f'Your VM is gone. Not run: "{body}" Sign up: https://signup.example.com' for body in ("by webhook", "by the list")))


@pytest.mark.parametrize("is_killed", [False, True])
async def test_who_opted_out_hears_nothing_of_a_vm_that_vanished(world, is_killed):
    vm = await world.ready(RECONCILE_S=EVERY)
    await world.text("STOP")
    world.fly.everything.pop(vm.app)
    world.vms.gone(vm.app)
    await sweeps(world, 5)
    if is_killed:
        await world.crash_and_restart()
    assert (await world.text("hello")).said == ""
    await world.clock.advance(30)
    assert world.saved["routes"][ANN]["state"] == "failed" and not world.twilio.count("send")


async def test_a_vm_that_came_back_before_its_owner_heard_that_it_was_gone_runs_texts(world):
    vm = await world.ready(RECONCILE_S=EVERY)
    app = world.fly.everything.pop(vm.app)
    world.twilio.fails("send", 503, times=1000)
    await sweeps(world, 5)
    assert world.saved["routes"][ANN]["state"] == "failed"
    world.fly.everything[vm.app] = app
    await sweeps(world, 5)
    assert world.saved["routes"][ANN]["state"] == "ready"
    await world.text("hello")
    await world.clock.until(lambda: vm.ran == ["hello"])


async def test_a_refused_sign_up_leaves_the_record_of_the_vm_that_is_gone(world):
    await world.start(RECONCILE_S=EVERY)
    vm = await world.sign_up()
    await world.sign_up(BOB)
    world.fly.everything.pop(vm.app)
    world.vms.gone(vm.app)
    await sweeps(world, 5)
    await world.restart(VM_LIMIT=1)
    assert (await world.provision()).body["code"] == "vm_limit"
    assert (await world.call("GET", f"/provision/{vm.app}")).body["state"] == "failed"


async def test_a_list_that_lags_makes_no_vm_vanish(world):
    await world.start(RECONCILE_S=EVERY)
    vm = await world.sign_up()
    world.fly.fails("org_machines", 200, times=1000, body={"machines": [], "next_cursor": "", "error_regions": []})
    world.fly.fails("list_apps", 200, times=1000, body={"apps": []})
    await sweeps(world, 5)
    assert world.saved["routes"][ANN]["state"] == "ready" and vm.app in world.fly.apps


@pytest.mark.parametrize("state", ["stopped", "suspended"])
async def test_a_machine_that_stopped_is_started_unasked(world, state):
    await world.start(RECONCILE_S=EVERY)
    vm = await world.sign_up()
    world.fly.rests(vm, state)
    await sweeps(world)
    assert world.fly.count("start_machine") == 1 and vm.is_up()


async def test_a_vm_that_hangs_is_restarted_after_three_sweeps_once_in_ten_minutes(world):
    await world.start(RECONCILE_S=100, VM_COMMAND_TIMEOUT_S=30, PROVISION_TIMEOUT_S=20, VM_AWAY_LIMIT_S=6000)
    vm = await world.sign_up()
    vm.away = 503
    await sweeps(world, 4)
    assert not world.fly.count("restart_machine")  # nobody called it: nothing is known to be wrong
    await world.text("hello")
    await sweeps(world, 2)
    assert not world.fly.count("restart_machine") and (await world.call("GET", f"/provision/{vm.app}")).body["state"] == "away"
    await sweeps(world, 1)
    assert world.fly.count("restart_machine") == 1
    await sweeps(world, 4)
    assert world.fly.count("restart_machine") == 1
    await sweeps(world, 3)
    assert world.fly.count("restart_machine") == 2


async def test_a_vm_is_not_restarted_while_a_command_may_be_running_there(world):
    await world.start(RECONCILE_S=100, VM_COMMAND_TIMEOUT_S=600, VM_AWAY_LIMIT_S=6000)
    vm = await world.sign_up()
    vm.then({"cut": "after"})
    world.vms.fails("health", 503)
    await world.text("hello")
    await world.clock.until(lambda: vm.asked)
    vm.away = 503
    await sweeps(world, 5)
    assert not world.fly.count("restart_machine")
    await sweeps(world, 2)
    assert world.fly.count("restart_machine") == 1


async def test_a_busy_vm_is_not_restarted(world):
    await world.start(RECONCILE_S=EVERY)
    vm = await world.sign_up()
    vm.busy = True
    await world.text("hello")
    await sweeps(world, 20)
    assert not world.fly.count("restart_machine")


@pytest.mark.parametrize("status", [401, 403])
async def test_fly_refusing_us_is_on_health_logged_once_a_minute_and_asked_less(world, caplog, status):
    await world.start(RECONCILE_S=60)
    vm = await world.sign_up()
    world.fly.fails("create_app", status, times=10000, body={"error": "unauthorized"})
    for _ in range(5):
        assert (await world.provision(BOB)).status == 502
    assert [record.getMessage() for record in caplog.records].count("fly_refuses_us") == 1
    world.fly.fails("list_apps", status, times=10000, body={"error": "unauthorized"})
    world.fly.fails("delete_app", status, times=10000, body={"error": "unauthorized"})
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 202
    health = await world.call("GET", "/health")
    assert health.status == 200 and "Fly refuses our token" in health.text
    asked, logged = world.fly.count("list_apps"), len(caplog.records)
    await world.clock.advance(1800)
    assert world.fly.count("list_apps") - asked <= 9
    refusals = [record for record in caplog.records[logged:] if record.levelno >= logging.WARNING]
    assert 5 <= len(refusals) <= 31
    world.fly.opens_all()
    await world.clock.advance(400)
    assert "refuses" not in await troubles(world) and not world.fly.apps


# The comparison of worlds, without any I/O

GATEWAY_ID = "gateway0"
MINE = "cockpit-vm-mine0000"


def a_machine(app: str = MINE, phone: str = ANN, *, id: str = "m1", state: str = "started", image: str = "vm-image:7", **stamped: str) -> cockpit.Machine:
    metadata = stamp(app, phone, GATEWAY_ID) | stamped
    return cockpit.Machine(id=id, state=state, region="iad", app=app, image=image, config={"image": image, "metadata": metadata}, metadata=metadata)


def a_route(**changes: str) -> cockpit.Route:
    return cockpit.Route(**{"vm_id": MINE, "machine_id": "m1", "image": "vm-image:7", "state": "ready"} | changes)


WORLDS = {
    "all is well": ([a_machine()], {ANN: a_route()}, []),
    "a machine stopped": ([a_machine(state="stopped")], {ANN: a_route()}, ["start"]),
    "a machine was suspended": ([a_machine(state="suspended")], {ANN: a_route()}, ["start"]),
    "a machine is gone": ([], {ANN: a_route()}, ["give_up"]),
    "a machine was replaced in our app": ([a_machine(id="m2")], {ANN: a_route()}, ["take_over"]),
    "a machine without proof replaced ours": ([a_machine(id="m2", cockpit_owner="forged")], {ANN: a_route()}, ["give_up"]),
    "two machines replaced ours": ([a_machine(id="m2"), a_machine(id="m3")], {ANN: a_route()}, ["give_up"]),
    "a VM given up is back": ([a_machine()], {ANN: a_route(state="failed")}, ["take_over"]),
    "a VM given up stays gone": ([], {ANN: a_route(state="failed")}, []),
    "a VM is being set up": ([], {ANN: a_route(state="provisioning")}, []),
    "another image runs": ([a_machine(image="vm-image:8")], {ANN: a_route()}, ["note_image"]),
    "the stamp is of the first version": ([a_machine(cockpit_pairing="")], {ANN: a_route()}, ["stamp"]),
    "the VM rewrote whose it is": ([a_machine(cockpit_phone=EVE)], {ANN: a_route()}, ["stamp"]),
    "nobody has a route to ours": ([a_machine()], {}, ["adopt"]),
    "ours without proof": ([a_machine(cockpit_owner="forged")], {}, ["report"]),
    "another gateway's": ([a_machine(cockpit_gateway="cockpit.example.com/another0")], {}, ["report"]),
    "a second VM claims a routed number": ([a_machine(), a_machine("cockpit-vm-other000")], {ANN: a_route()}, ["report"]),
}


@pytest.mark.parametrize("machines, routes, actions", WORLDS.values(), ids=WORLDS)
def test_two_sweeps_conclude_from_a_world_what_is_to_be_done(machines, routes, actions):
    settings_ = cockpit.Settings.from_env(settings())

    class Routes:
        gateway_id = GATEWAY_ID
    blueprint = cockpit.Blueprint(settings_, cockpit.Keyring([SECRET]), Routes())
    apps = {machine.app for machine in machines}

    def found(**more) -> list[cockpit.Action]:
        return list(cockpit.compare(apps, machines, routes, blueprint, **more))
    assert {action.kind for action in cockpit.what_is_due(found(), [])} <= {"start", "probe"}, "Fly's lists may lag: what is seen once is not acted on"
    assert [action.kind for action in cockpit.what_is_due(found(), found())] == actions
    assert "give_up" not in [action.kind for action in found(is_whole=False)], "it may be in a region that Fly did not ask"
    if routes:
        assert {action.kind for action in found(busy={MINE})} <= {"report"}


# A lost disk

async def test_a_start_with_a_lost_disk_adopts_what_fly_holds(world):
    await world.start()
    for phone in (ANN, BOB):
        await world.sign_up(phone)
    await world.clock.advance(5)
    before = world.saved
    await world.stop()
    for file in world.file.parent.iterdir():
        file.unlink()
    world.fly.plants("cockpit-vm-forged00", cockpit_gateway=STAMP + before["gateway_id"], cockpit_phone=EVE, cockpit_owner="forged")
    await world.start()
    assert world.saved["gateway_id"] == before["gateway_id"]
    adopted = {phone: without(route, "awake_since") for phone, route in world.saved["routes"].items()}
    assert adopted == {phone: without(route, "steps", "awake_since") for phone, route in before["routes"].items()}
    await world.text("hello")
    await world.hears("ran: hello")


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_fly_that_refuses_to_list_makes_no_vm_and_a_caller_hears_why(world, status):
    world.fly.fails("list_apps", status, times=100)
    await world.start()
    answer = await world.provision()
    assert (answer.status, answer.body["code"]) == (503, "fly_unavailable") and f"list apps: {status}" in answer.body["detail"]
    world.fly.heals("list_apps")
    await world.clock.advance(300)
    await world.sign_up()


async def test_a_lost_disk_with_fly_out_of_reach_makes_no_vm_and_refuses_no_text_for_good(world):
    await world.start()
    await world.sign_up()
    await world.clock.advance(5)
    await world.stop()
    for file in world.file.parent.iterdir():
        file.unlink()
    world.fly.fails("list_apps", 503, times=10000)
    await world.start()
    answer = await world.provision(BOB)
    assert answer.status == 503 and answer.headers["Retry-After"] and answer.body["code"] == "fly_unavailable"
    assert (await world.call("GET", "/health")).status == 200 and "not adopted yet" in await troubles(world)
    assert (await world.twilio.texts(ANN, "hello")).status == 503
    world.fly.heals("list_apps")
    await world.clock.until(lambda: ANN in world.saved["routes"], 600)
    assert (await world.provision(BOB)).status == 201 and not await troubles(world)


async def loses_routes_with_a_text_in_flight(world) -> FakeVM:
    """The disk loses all but the database, while one text runs, one waits and one answer is on its way."""
    vm = await world.ready(RECONCILE_S=60, VM_AWAY_LIMIT_S=6000)
    await world.clock.advance(5)
    sending = world.twilio.holds("send")
    await world.text("answered")
    await world.clock.until(sending.arrived.is_set)
    running = vm.holds()
    await world.text("running")
    await world.text("waiting")
    await world.clock.until(running.arrived.is_set)
    await world.crash()
    sending.open()
    running.open()
    for file in world.file.parent.iterdir():
        if ".db" not in file.name:
            file.unlink()
    return vm


@pytest.mark.parametrize("status", [503, 401])
async def test_texts_of_vms_without_a_route_go_on_once_fly_tells_whose_they_are(world, status):
    vm = await loses_routes_with_a_text_in_flight(world)
    world.fly.fails("list_apps", status, times=10000)
    await world.start()
    await world.clock.advance(100)
    assert vm.ran == ["answered", "running"]
    await world.stop()
    if status == 503:
        await world.start()
    world.fly.heals("list_apps")
    if status == 401:
        await world.start()
    await world.clock.until(lambda: len(vm.ran) == 3, 600)
    await world.clock.advance(30)
    assert vm.ran == ["answered", "running", "waiting"]
    assert sorted(world.twilio.sent_to(ANN)) == sorted(["ran: answered", "ran: running", "ran: waiting"])


async def test_texts_of_a_vm_that_an_old_backup_lacks_go_on_once_it_is_adopted(world):
    vm = await world.ready(RECONCILE_S=60, VM_AWAY_LIMIT_S=6000)
    await world.sign_up(BOB)
    running = vm.holds()
    await world.text("running")
    await world.text("waiting")
    await world.clock.until(running.arrived.is_set)
    await world.crash()
    running.open()
    backup = world.saved
    del backup["routes"][ANN]
    world.file.write_text(json.dumps(backup))
    await world.start()
    await world.clock.until(lambda: vm.ran == ["running", "waiting"], 600)
    await world.clock.until(lambda: {"ran: running", "ran: waiting"} <= set(world.twilio.sent_to(ANN)))
    assert world.saved["routes"][ANN]["vm_id"] == vm.app


async def test_texts_of_vms_that_nobody_knows_are_dropped_after_an_hour(world):
    vm = await loses_routes_with_a_text_in_flight(world)
    world.fly.everything.pop(vm.app)
    await world.start()
    await world.clock.advance(3500)
    await world.text("about somebody else", phone=BOB)
    assert ("waiting",) in world.rows("SELECT body FROM texts")
    await world.clock.advance(200)
    await world.stop()
    assert not world.rows("SELECT * FROM texts")
    assert not world.rows("SELECT * FROM vms")


def without(route: dict, *names: str) -> dict:
    return {name: value for name, value in route.items() if name not in names}


async def test_several_gateways_of_one_host_are_named_and_one_is_to_be_chosen(world, told):
    vm = await world.ready()
    before = world.saved
    await world.clock.advance(5)
    await world.stop()
    world.fly.plants("cockpit-vm-other000", **stamp("cockpit-vm-other000", BOB, "another0"))
    world.fly.plants("cockpit-vm-noproof0", **stamp("cockpit-vm-noproof0", EVE, "third000", secret="s" * 32))
    for file in world.file.parent.iterdir():
        file.unlink()
    await world.start()
    refused = await world.provision(EVE)
    assert (refused.status, refused.body["code"]) == (503, "fly_unavailable")
    assert "set GATEWAY_ID" in refused.body["detail"]
    assert before["gateway_id"] in refused.body["detail"] and "another0" in refused.body["detail"]
    assert "third000" not in refused.body["detail"], "a stamp without proof counts for nothing"
    assert any(line["event"] == "adoption_refused" and "set GATEWAY_ID" in line["error"] for line in told())
    await world.restart(GATEWAY_ID=before["gateway_id"])
    assert set(world.saved["routes"]) == {ANN}
    assert world.saved["gateway_id"] == before["gateway_id"]
    own_time = ("steps", "created_at", "awake_since")
    assert without(world.saved["routes"][ANN], *own_time) == without(before["routes"][ANN], *own_time)
    await world.text("hello")
    await world.clock.until(lambda: vm.ran == ["hello"])


async def test_a_vm_that_shifts_the_borders_in_its_stamp_does_not_pass_for_another_gateway(world):
    vm = await world.ready()
    await world.sign_up(BOB)
    machine, = world.fly.apps[vm.app].machines.values()
    machine.config["metadata"] |= {"cockpit_gateway": ours(world) + ":0", "cockpit_pairing": "paired"}
    await world.clock.advance(5)
    await world.stop()
    for file in world.file.parent.iterdir():
        file.unlink()
    await world.start()
    assert set(world.saved["routes"]) == {BOB} and not await troubles(world)


# Doctor

async def doctor(live, capsys, **changes: str) -> tuple[int, str]:
    code = await cockpit.examine(cockpit.Settings.from_env(live.environ | {"ROUTES_FILE": str(live.file), "PUBLIC_URL": PUBLIC} | changes))
    said = "".join(capsys.readouterr())
    assert_nothing_secret(said)
    return code, said


async def test_the_doctor_finds_all_well_beside_a_running_gateway(live, capsys):
    await live.spawn()
    code, said = await doctor(live, capsys)
    assert code == 0 and "wrong" not in said and sum(line.startswith("ok") for line in said.splitlines()) >= 6, said


@beside
async def test_the_doctor_names_settings_that_are_wrong(live):
    child = await Child.start(live.environ | {"COCKPIT_SECRET": "short", "VM_CPUS": "3"}, free_port(), live.disks, "doctor")
    assert await child.ends() == 1 and "wrong COCKPIT_SECRET" in child.log and "wrong VM_CPUS" in child.log


@pytest.mark.parametrize("changes, spoil, named", [
    ({"ROUTES_FILE": "/nowhere/routes.json"}, {}, "ROUTES_FILE"), ({"FLY_API_TOKEN": "FlyV1 fm2_wrong"}, {}, "FLY_API_TOKEN"), ({"FLY_ORG": "other"}, {}, "FLY_ORG"),
    ({"TWILIO_AUTH_TOKEN": "wrong"}, {}, "Twilio account"), ({"TWILIO_PHONE_NUMBER": BOB}, {}, "TWILIO_PHONE_NUMBER"),
    ({}, {"sms_url": "https://elsewhere.example.com/sms"}, "webhook"), ({}, {"sms_application_sid": "AP1"}, "webhook")])
async def test_the_doctor_names_what_is_wrong_and_what_to_do(live, capsys, changes, spoil, named):
    live.twilio.number |= spoil
    code, said = await doctor(live, capsys, **changes)
    assert code == 1 and any(line.startswith("wrong") and named in line for line in said.splitlines()), said
    live.fly.objections.clear()
    live.twilio.objections.clear()


async def test_the_doctor_knows_the_webhook_that_the_readme_names(live, capsys):
    live.twilio.number["sms_url"] += re.search(r"/sms(#\S+?)`", Path(cockpit.__file__).with_name("README.md").read_text())[1]
    code, said = await doctor(live, capsys)
    assert code == 0 and "webhook" not in said, said


# Verbs that work with the VM dead

async def test_the_gateway_answers_its_verbs_at_once_with_the_vm_dead(world):
    await world.start(VM_AWAY_LIMIT_S=6000)
    vm = await world.sign_up()
    vm.away = 503
    await world.text("first")
    await world.hears(RESTARTING)
    await world.text("second")
    began = world.clock.elapsed
    await world.text(" Cockpit STATUS ")
    await world.text("cockpit queue")
    await world.text("cockpit help")
    await world.clock.until(lambda: len(world.twilio.sent_to(ANN)) == 4)
    assert world.clock.elapsed - began < 5
    _, status, queue, usage = world.twilio.sent_to(ANN)
    assert "away" in status and "2 waiting" in status
    assert queue == 'Nothing is running.\n1. "first"\n2. "second"'
    assert all(f"cockpit {verb}" in usage for verb in ("status", "restart", "queue", "cancel"))
    vm.away = 0
    await world.clock.until(lambda: len(vm.ran) == 2)
    assert vm.ran == ["first", "second"]


@pytest.mark.parametrize("body", ["cockpit status please", "status", "cockpit  status", "run cockpit status"])
async def test_anything_but_exactly_a_verb_goes_to_the_vm(world, body):
    await world.start()
    vm = await world.sign_up()
    await world.text(body)
    await world.hears(f"ran: {body}")
    assert vm.ran == [body]


async def test_cancel_drops_what_waits_and_not_what_runs(world):
    await world.start()
    vm = await world.sign_up()
    gate = vm.holds()
    for body in ("long", "second", "third"):
        await world.text(body)
    await gate.arrived.wait()
    await world.text("cockpit cancel")
    await world.hears("Not run: 2 texts dropped.")
    await world.text("cockpit cancel")
    await world.hears("Not run: 2 texts dropped.", 'Nothing is waiting. Running: "long"')
    vm.gate = None
    gate.open()
    await world.text("fourth")
    await world.hears("Not run: 2 texts dropped.", 'Nothing is waiting. Running: "long"', "ran: long", "ran: fourth")
    await world.crash_and_restart()
    await world.clock.advance(30)
    assert vm.ran == ["long", "fourth"]


async def test_an_owner_restarts_a_vm_by_a_text_and_what_waited_runs_then(world):
    await world.start(VM_AWAY_LIMIT_S=6000)
    vm = await world.sign_up()
    vm.away = 503
    await world.text("first")
    await world.hears(RESTARTING)
    sid = world.twilio.missed(ANN, "cockpit restart")
    for _ in range(2):  # delivered twice, done once
        assert (await world.twilio.texts(ANN, "cockpit restart", MessageSid=sid)).status == 200
    await world.clock.until(lambda: world.fly.count("restart_machine"))
    vm.away = 0
    await world.hears(RESTARTING, "Your VM is being restarted. What waits will run when it is back.", "ran: first")
    assert world.fly.count("restart_machine") == 1


@pytest.mark.parametrize("body", ["cockpit", " Cockpit ", "cockpit upgrade", "cockpit stopp"])
async def test_cockpit_alone_and_an_unknown_verb_are_answered_with_the_help(world, body):
    vm = await world.ready()
    await world.text(body)
    await world.hears(cockpit.COMMANDS_HELP)
    assert not vm.ran


async def test_what_is_stopped_tells_no_exit_code_and_ends_without_a_word_if_it_said_none(world):
    vm = await world.ready()
    await world.occupies(vm, "long")
    await world.text("cockpit stop")
    await world.hears("Stopped.", "so far")
    vm.answer = lambda text: {"text": "by itself", "images": [], "exitCode": 3, "durationMs": 1}
    await world.text("next")
    await world.hears("Stopped.", "so far", "by itself\nExit code 3.")
    vm.so_far = ""
    await world.occupies(vm, "silent")
    await world.text("cockpit stop")
    await world.hears("Stopped.", "so far", "by itself\nExit code 3.", "Stopped.")
    await world.clock.advance(5)
    assert len(world.twilio.sent) == 4 and not world.rows("SELECT * FROM texts") and not world.rows("SELECT * FROM outbound")


@pytest.mark.parametrize("runs, stops, heard", [
    (True, False, "Your VM cannot stop a command; cockpit restart restarts it."), (False, True, "Nothing is running.")])
async def test_a_stop_that_ends_nothing_says_why(world, runs, stops, heard):
    vm = await world.ready()
    vm.stops = stops
    gate = await world.occupies(vm, "long") if runs else Gate()
    await world.text("cockpit stop")
    await world.hears(heard)
    vm.answer = lambda text: {"text": "done", "images": [], "exitCode": 3, "durationMs": 1}
    gate.open()
    await world.hears(heard, *["done\nExit code 3."] * runs)


async def test_a_stop_while_the_vm_is_away_stops_nothing_and_says_so(world):
    vm = await world.ready()
    vm.away = 503
    await world.text("first")
    await world.hears(RESTARTING)
    await world.text("cockpit stop")
    away = "Your VM did not answer: nothing was stopped. cockpit cancel drops what waits."
    await world.hears(RESTARTING, away)
    vm.away = 0
    await world.hears(RESTARTING, away, "ran: first")


async def test_a_stop_reaches_a_command_that_is_given_up(world):
    vm = await world.ready(VM_COMMAND_TIMEOUT_S=5)
    await world.occupies(vm, "slow")
    await world.text("next")
    given_up = 'No answer after 5 s; it may still be running: "slow"'
    await world.hears(given_up)
    await world.text("cockpit stop")
    await world.hears(given_up, "Stopped.", "ran: next")


async def test_a_stop_that_was_asked_for_is_carried_out_though_the_gateway_is_killed(world):
    vm = await world.ready()
    await world.occupies(vm, "long")
    gate = world.vms.holds("cancel")
    await world.text("cockpit stop")
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart()
    await world.hears("Stopped.", "so far")


async def test_a_stop_owed_to_a_vm_that_is_adopted_during_the_start_is_carried_out_once(world):
    vm = await world.ready()
    await world.occupies(vm, "long")
    cancel = world.vms.holds("cancel")
    await world.text("cockpit stop")
    await world.clock.until(cancel.arrived.is_set)
    await world.crash()
    world.loses_its_routes()
    world.fly.deaf, listed, cancel = True, world.twilio.holds("list"), world.vms.holds("cancel")
    start = asyncio.ensure_future(world.start(BACKFILL_S=60))
    await real_until(listed.arrived.is_set)
    world.fly.deaf = False
    await start
    await world.clock.until(cancel.arrived.is_set)
    listed.open()
    cancel.open()
    await world.hears("Stopped.", "so far")


async def test_a_stop_that_a_start_carries_out_ends_no_later_text_in_its_place(world):
    vm = await world.ready()
    gate = await world.occupies(vm, "one")
    held = world.vms.holds("cancel")
    await world.text("cockpit stop")
    await world.clock.until(held.arrived.is_set)
    await world.crash()
    gate.open()
    await world.clock.until(lambda: not vm.busy)
    cancel = world.vms.holds("cancel")
    await world.start()
    await world.text("two")
    await world.clock.until(cancel.arrived.is_set)
    await world.clock.advance(2)
    assert vm.ran == ["one"]
    cancel.open()
    await world.hears("Nothing is running.", "ran: one", "ran: two")
    assert world.vms.calls("cancel")[-1].headers["Idempotency-Key"] == vm.asked[0].key


async def test_a_stop_that_twilio_s_list_tells_late_ends_no_text_that_came_behind_it(world):
    vm = await world.ready(BACKFILL_S=20)
    await world.clock.advance(5)
    world.twilio.missed(ANN, "cockpit stop")
    await world.clock.advance(10)
    gate = await world.occupies(vm, "behind it")
    await world.hears('Running: "behind it"')
    world.twilio.missed(ANN, "cockpit stop")
    await world.hears('Running: "behind it"', "Stopped.", "so far")
    assert gate.opened.is_set() and world.vms.count("cancel") == 1


async def test_a_cancel_that_twilio_s_list_tells_late_drops_nothing_and_tells_what_waits(world):
    vm = await world.ready(BACKFILL_S=20)
    gate = await world.occupies(vm, "running")
    await world.text("before it")
    world.twilio.missed(ANN, "cockpit cancel")
    await world.clock.advance(5)
    await world.text("behind it")
    queue = 'Running: "running"\n1. "before it"\n2. "behind it"'
    await world.hears(queue)
    vm.gate = None
    gate.open()
    await world.hears(queue, "ran: running", "ran: before it", "ran: behind it")


@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_text_behind_a_stop_that_is_still_on_its_way_is_not_ended_by_it(world, is_killed):
    vm = await world.ready()
    cancel = world.vms.holds("cancel")
    await world.text("cockpit stop")
    await world.clock.until(cancel.arrived.is_set)
    if is_killed:
        await world.crash()
        cancel = world.vms.holds("cancel")
        await world.start()
        await world.clock.until(cancel.arrived.is_set)
    await world.text("behind it")
    await world.clock.advance(2)
    gate = vm.holds()
    cancel.open()
    await world.clock.advance(2)
    gate.open()
    await world.hears("Nothing is running.", "ran: behind it")


async def test_a_repeated_stop_ends_no_later_command(world):
    vm = await world.ready()
    sid = "SM" + "d" * 32
    assert (await world.twilio.texts(ANN, "cockpit stop", MessageSid=sid)).status == 200
    await world.hears("Nothing is running.")
    gate = await world.occupies(vm, "long")
    assert (await world.twilio.texts(ANN, "cockpit stop", MessageSid=sid)).status == 200
    await world.clock.advance(3)
    gate.open()
    await world.hears("Nothing is running.", "ran: long")
    assert world.vms.count("cancel") == 1


async def test_a_stop_repeated_while_it_is_carried_out_stays_one_stop(world):
    vm = await world.ready()
    sid = "SM" + "d" * 32
    await world.occupies(vm, "long")
    cancel = world.vms.holds("cancel")
    await world.text("cockpit stop", MessageSid=sid)
    await world.clock.until(cancel.arrived.is_set)
    with contextlib.closing(sqlite3.connect(world.database)) as disk:
        disk.execute("BEGIN IMMEDIATE")
        again = asyncio.ensure_future(world.twilio.texts(ANN, "cockpit stop", MessageSid=sid))
        await real_until(world.clock.is_writing)
        cancel.open()
        await asyncio.sleep(0.1)  # the first one is over
    await world.clock.run(again)
    await world.hears("Stopped.", "so far")
    gate = await world.occupies(vm, "later")
    await world.crash_and_restart()
    await world.clock.advance(5)
    gate.open()
    await world.hears("Stopped.", "so far", "ran: later")


async def test_a_restart_that_cannot_be_stored_holds_up_no_text_that_came_just_before_it(world):
    vm = await world.ready()
    with contextlib.closing(sqlite3.connect(world.database)) as disk:
        disk.execute("BEGIN IMMEDIATE")
        text = asyncio.ensure_future(world.twilio.texts(ANN, "one"))
        await real_until(world.clock.is_writing)
        restart = asyncio.ensure_future(world.twilio.texts(ANN, "cockpit restart"))
        await asyncio.sleep(0.1)  # it waits behind the text
        world.database.unlink()
    answers = await world.clock.run(asyncio.gather(text, restart))
    assert [answer.status for answer in answers] == [200, 503]
    await world.clock.until(lambda: vm.ran == ["one"], 60)


async def test_a_new_conversation_that_is_asked_for_again_by_the_same_text_begins_once(world):
    vm = await world.ready()
    sid = "SM" + "d" * 32
    await world.text("cockpit new", MessageSid=sid)
    await world.text("one")
    await world.text("cockpit new", MessageSid=sid)
    await world.text("two")
    await world.hears("The next text starts a new conversation.", "ran: anew one", "ran: two")
    assert vm.ran == ["one", "two"]


async def test_a_repeated_cancel_is_not_owed_though_the_vm_s_state_was_stored_meanwhile(world):
    vm = await world.ready()
    await world.text("cockpit cancel", MessageSid="SM" + "c" * 32)
    gate = await world.occupies(vm, "first")
    await world.text("second")
    store, writing = world.server.runner.app[cockpit.GATEWAY].messages, threading.Event()
    store.thread.submit(writing.wait, 10)
    repeated = asyncio.ensure_future(world.text("cockpit cancel", MessageSid="SM" + "c" * 32))
    await real_until(lambda: store.at_work)
    asked = asyncio.ensure_future(world.text("cockpit new"))
    await real_until(lambda: store.queue)
    writing.set()
    await asyncio.gather(repeated, asked)
    await world.clock.settle()
    await world.crash_and_restart()
    gate.open()
    await world.clock.until(lambda: vm.ran == ["first", "second"])


async def test_a_repeated_text_is_not_the_next_one(world):
    vm = await world.ready()
    sid = "SM" + "e" * 32
    assert (await world.twilio.texts(ANN, "one", MessageSid=sid)).status == 200
    await world.hears("ran: one")
    await world.text("cockpit new")
    assert (await world.twilio.texts(ANN, "one", MessageSid=sid)).status == 200
    await world.text("two")
    await world.hears("ran: one", "The next text starts a new conversation.", "ran: anew two")
    assert vm.ran == ["one", "two"]


async def test_a_new_conversation_begins_with_the_text_behind_what_waits(world):
    vm = await world.ready()
    gate = await world.occupies(vm, "one")
    for body in ("two", "cockpit new", "three", "cockpit new", "four"):
        await world.text(body)
    vm.gate = None
    gate.open()
    await world.clock.until(lambda: len(world.twilio.sent) == 6)
    assert world.twilio.sent_to(ANN)[2:] == ["ran: one", "ran: two", "ran: anew three", "ran: anew four"]


@pytest.mark.parametrize("how", ["cancel", "lock"])
async def test_a_new_conversation_begins_with_the_next_text_when_its_own_is_dropped(world, how):
    vm = await world.ready()
    gate = await world.occupies(vm, "one")
    for body in ("cockpit new", "two", f"cockpit {how}"):
        await world.text(body)
    vm.gate = None
    gate.open()
    await world.clock.until(lambda: "ran: one" in world.twilio.sent_to(ANN))
    if how == "lock":
        await world.text(await code_of(world, vm))
    await world.crash_and_restart()
    await world.text("three")
    await world.clock.until(lambda: len(vm.ran) == 2)
    await world.clock.settle()
    assert world.twilio.sent_to(ANN)[-1] == "ran: anew three"


async def test_a_new_conversation_begins_with_what_is_behind_a_text_that_waited_too_long(world):
    vm = await world.ready(VM_AWAY_LIMIT_S=100)
    vm.away = 503
    await world.text("cockpit new")
    await world.text("two")
    await world.clock.advance(50)
    await world.text("three")
    await world.clock.advance(60)
    vm.away = 0
    await world.text("four")
    await world.clock.until(lambda: len(vm.ran) == 2)
    await world.clock.settle()
    assert world.twilio.sent_to(ANN)[-2:] == ["ran: anew three", "ran: four"]


async def test_a_status_tells_how_long_a_command_has_run_and_what_it_is_doing(world):
    vm = await world.ready()
    gate = await world.occupies(vm, "long")
    await world.clock.advance(40)
    vm.health |= {"busy": True, "note": "compiling\x1b[0m 3 of 11\n"}
    await world.text("cockpit status")
    await world.hears('Your VM is ready. Running: "long", for 40 s (compiling 3 of 11). 0 waiting.')
    await world.clock.advance(25)
    assert world.twilio.sent_to(ANN)[1:] == ["Still working on it. compiling 3 of 11"]
    vm.gate = None
    gate.open()
    await world.clock.until(lambda: len(world.twilio.sent) == 3)
    vm.health["note"] = "left running: node"
    await world.text("cockpit status")
    await world.clock.until(lambda: len(world.twilio.sent) == 4)
    assert world.twilio.sent_to(ANN)[3] == "Your VM is ready. Nothing is running (left running: node). 0 waiting."


async def test_a_vm_that_says_what_it_lacks_fails_the_sign_up_with_its_words(world):
    await world.start(PROVISION_TIMEOUT_S=20)
    world.vms.fails("health", 503, 1000, {"status": "failed", "note": f"there is no claude on this VM's PATH ({ANTHROPIC})"})
    answer = await world.provision()
    assert (answer.status, answer.body["code"]) == (504, "vm_unhealthy")
    assert answer.body["detail"].endswith(": there is no claude on this VM's PATH ([hidden])")


async def test_verbs_are_answered_during_set_up_too(world):
    await world.start()
    gate, job = await world.begin(world.fly, "create_machine")
    await world.text("cockpit status")
    await world.text("cockpit restart")
    await world.clock.until(lambda: len(world.twilio.sent_to(ANN)) == 2)
    assert "is provisioning" in world.twilio.sent_to(ANN)[0] and world.twilio.sent_to(ANN)[1].startswith("Not restarted")
    gate.open()
    assert (await world.clock.run(job)).status == 201


# --- Sleep ---

IDLE = 60


async def drowsy(world, **changes) -> FakeVM:
    """A gateway whose VMs are put to sleep, with one for Ann that has just become idle."""
    return await world.ready(VM_IDLE_S=IDLE, **changes)


def machine_of(world, vm: FakeVM) -> str:
    """What Fly says of its machine."""
    machine, = world.fly.apps[vm.app].machines.values()
    return world.fly.state(machine)


async def asleep(world, **changes) -> FakeVM:
    """One that sleeps."""
    vm = await drowsy(world, **changes)
    await falls_asleep(world, vm)
    return vm


async def falls_asleep(world, vm: FakeVM) -> None:
    await world.clock.until(lambda: machine_of(world, vm) == "suspended", IDLE + 40)
    await world.clock.settle()
    assert await state_of(world, vm) == "asleep"


async def state_of(world, vm: FakeVM) -> str:
    return (await world.call("GET", f"/provision/{vm.app}")).body["state"]


async def test_a_vm_without_work_is_suspended_after_a_while_and_not_before(world):
    vm = await drowsy(world)
    await world.clock.advance(IDLE - 1)
    assert not world.fly.count("suspend_machine")
    await falls_asleep(world, vm)
    assert world.fly.count("suspend_machine") == 1
    assert not world.fly.count("stop_machine"), "the root disk would be at risk"
    assert world.saved["routes"][ANN]["state"] == "asleep"
    assert (await world.call("GET", "/health")).body["vms"] == {"asleep": 1}
    assert 'cockpit_vms{state="asleep"} 1' in (await world.call("GET", "/metrics")).text


async def test_a_text_an_answer_and_a_message_of_the_vm_s_own_begin_the_idle_time_anew(world):
    vm = await drowsy(world)
    await world.clock.advance(IDLE - 10)
    gate = await world.occupies(vm, "first")
    await world.clock.advance(20)
    gate.open()
    await world.clock.advance(IDLE - 10)
    assert not world.fly.count("suspend_machine")
    await world.call("POST", "/messages", key=vm.env["COCKPIT_TOKEN"], json={"text": "by the way"})
    await world.clock.advance(IDLE - 10)
    assert not world.fly.count("suspend_machine")
    await falls_asleep(world, vm)


@pytest.mark.parametrize("why", ["busy", "silent", "in flight", "in the outbox", "away"])
async def test_a_vm_with_work_or_without_an_answer_is_not_suspended(world, why):
    vm = await drowsy(world)
    match why:
        case "busy":
            vm.health = {"status": "ok", "busy": True}
        case "silent":
            world.vms.fails("health", 500, times=10_000)
        case "in flight":
            await world.occupies(vm, "a long one")
        case "in the outbox":
            world.twilio.fails("send", 503, times=10_000, code=20503)
            await world.text("hello")
        case "away":
            vm.away = 503
            await world.text("hello")
    await world.clock.advance(3 * IDLE)
    assert not world.fly.count("suspend_machine")
    assert world.saved["routes"][ANN]["state"] == "ready"


async def test_a_vm_whose_return_nobody_waited_for_sleeps_too_and_is_away_no_more(world):
    vm = await drowsy(world)
    vm.away = 503
    await world.text("hello")
    await world.hears(RESTARTING)
    await world.text("cockpit cancel")
    await world.hears(RESTARTING, "Not run: 1 text dropped.")
    await world.clock.advance(3 * IDLE)
    assert not world.fly.count("suspend_machine")
    vm.away = 0
    await falls_asleep(world, vm)
    await world.crash_and_restart()
    assert await state_of(world, vm) == "asleep"
    await world.text("cockpit status")
    await world.text("wake up")
    await world.hears(RESTARTING, "Not run: 1 text dropped.", "Your VM is asleep. Nothing is running. 0 waiting.", "ran: wake up")


async def test_a_vm_that_was_busy_is_asked_again_and_then_suspended(world):
    vm = await drowsy(world)
    vm.health = {"status": "ok", "busy": True}
    await world.clock.advance(2 * IDLE)
    assert 1 <= world.vms.count("health") - 1 <= 4, "it is not asked all the time"
    vm.health = {"status": "ok", "busy": False}
    await falls_asleep(world, vm)


@pytest.mark.parametrize("guest", [{"memory_mb": 4096}, {}])
async def test_a_machine_that_fly_cannot_wake_as_it_was_stays_awake(world, guest, caplog):
    """It is over 2,048 MB, or it was made while VM_IDLE_S was 0 and a cold boot would empty its root disk."""
    vm = await world.ready()
    machine, = world.fly.apps[vm.app].machines.values()
    machine.config["guest"] |= guest
    if guest:
        machine.config["rootfs"]["persist"] = "always"
    await world.restart(VM_IDLE_S=IDLE)
    await world.clock.advance(4 * IDLE)
    assert not world.fly.count("suspend_machine")
    told = [record for record in caplog.records if record.getMessage() == "vm_not_suspended"]
    assert len(told) == 1, "once an hour"


async def test_an_upgrade_makes_an_older_machine_one_that_can_sleep(world):
    vm = await world.ready()
    await world.clock.advance(5)
    await world.restart(VM_IDLE_S=IDLE)
    assert (await world.call("POST", f"/provision/{vm.app}/upgrade")).status == 200
    await falls_asleep(world, vm)


def test_the_start_and_the_doctor_are_told_of_guests_too_large_to_sleep():
    large = settings(VM_IDLE_S=60, VM_CPUS=2, VM_MEMORY_MB=4096)
    assert "VM_MEMORY_MB" in cockpit.Settings.from_env(large).sleep_obstacle
    assert not cockpit.Settings.from_env(large | {"VM_IDLE_S": "0"}).sleep_obstacle
    assert not cockpit.Settings.from_env(large | {"VM_MEMORY_MB": "2048"}).sleep_obstacle


@pytest.mark.parametrize("command, said", [("doctor", "note  settings: VM_IDLE_S: Fly suspends no guest over 2048 MB"), ("", "vms_stay_awake")])
@beside
async def test_what_keeps_vms_awake_is_printed(live, command, said):
    large = {"VM_IDLE_S": "60", "VM_CPUS": "2", "VM_MEMORY_MB": "4096", "ROUTES_FILE": str(live.file)}
    child = await live.adopt(await Child.start(live.environ | large, free_port(), live.disks, *command.split()), wait=False)
    deadline = time.monotonic() + 12
    while said not in child.log:
        assert time.monotonic() < deadline, child.log
        await asyncio.sleep(0.03)
    await child.ends(signal.SIGTERM)


async def test_with_no_idle_time_set_no_vm_sleeps_and_its_machine_is_as_before(world):
    vm = await world.ready()
    await world.clock.advance(100_000)
    assert not world.fly.count("suspend_machine")
    machine, = world.fly.apps[vm.app].machines.values()
    assert machine.config["rootfs"] == {"persist": "restart"}


async def test_the_root_disk_of_a_vm_that_sleeps_survives_a_cold_boot(world):
    vm = await drowsy(world)
    machine, = world.fly.apps[vm.app].machines.values()
    assert machine.config["rootfs"] == {"persist": "always"}


async def test_vms_fall_asleep_one_a_second(world):
    await world.start(VM_IDLE_S=IDLE)
    vms = [await world.sign_up(f"+1555100000{n}") for n in range(4)]
    for vm in vms:
        await world.clock.until(lambda vm=vm: machine_of(world, vm) == "suspended", IDLE + 40)
    at = [seen.at for seen in world.fly.calls("suspend_machine")]
    assert all(later - earlier >= 1 for earlier, later in itertools.pairwise(at))


# A text at every moment

FALLING = [("fly", "get_machine", False), ("fly", "get_machine", True), ("vms", "health", False), ("vms", "health", True),
           ("fly", "suspend_machine", False), ("fly", "suspend_machine", True)]


@pytest.mark.parametrize("freeze_s", [0, 2])
@pytest.mark.parametrize("fake, call, after", FALLING)
async def test_a_text_at_any_instant_of_falling_asleep_is_answered_once_without_a_notice(world, fake, call, after, freeze_s):
    vm = await drowsy(world)
    world.fly.freeze_s = freeze_s
    gate = getattr(world, fake).holds(call, after=after)
    await world.clock.until(gate.arrived.is_set, IDLE + 20)
    await world.text("wake up")
    await world.clock.advance(0.5)
    gate.open()
    await world.hears("ran: wake up")
    assert vm.ran == ["wake up"]
    assert len({command.key for command in vm.asked}) == 1
    assert await state_of(world, vm) == "ready"


async def test_a_text_between_the_mark_and_the_call_keeps_it_awake(world):
    vm = await drowsy(world)
    gate = world.vms.holds("health")
    await world.clock.until(gate.arrived.is_set, IDLE + 20)
    written = world.threads.holds()
    gate.open()
    await real_until(lambda: world.threads.held is None)
    assert (await world.ask("GET", f"/provision/{vm.app}")).body["state"] == "asleep"
    await world.twilio.texts(ANN, "wake up")
    written.set()
    await world.hears("ran: wake up")
    assert not world.fly.count("suspend_machine")
    assert not world.fly.count("start_machine")
    assert await state_of(world, vm) == "ready"


async def test_a_text_wakes_a_vm_and_its_owner_hears_only_the_answer(world):
    vm = await asleep(world)
    world.fly.resume_s = 4
    await world.text("wake up")
    await world.hears("ran: wake up")
    assert world.fly.count("start_machine") == 1
    assert world.saved["routes"][ANN]["state"] == "ready"
    await falls_asleep(world, vm)


async def test_the_wake_adds_less_than_a_tenth_of_a_second_to_what_fly_takes(world):
    vm = await asleep(world)
    world.fly.resume_s = 3
    began = world.clock.elapsed
    await world.text("wake up")
    await world.clock.until(lambda: vm.ran)
    assert world.clock.elapsed - began - 3 < 0.1


async def test_a_wake_that_takes_longer_than_five_seconds_is_told_once(world):
    await asleep(world)
    world.fly.resume_s = 8
    await world.text("wake up")
    await world.text("are you there?")
    await world.hears(RESTARTING, "ran: wake up", "ran: are you there?")


async def test_nothing_is_handed_to_a_vm_that_is_being_suspended_though_it_still_answers(world):
    vm = await drowsy(world)
    gate = world.fly.holds("suspend_machine")
    await world.clock.until(gate.arrived.is_set, IDLE + 20)
    await world.text("wake up")
    await world.hears(RESTARTING)
    await world.clock.advance(10)
    assert not vm.asked
    gate.open()
    await world.hears(RESTARTING, "ran: wake up")


async def test_a_sweep_takes_no_vm_for_awake_that_is_just_waking(world):
    vm = await asleep(world, RECONCILE_S=1)
    vm.away = 503
    await world.text("wake up")
    await world.clock.advance(3)
    vm.away = 0
    await world.hears("ran: wake up")


async def test_a_text_without_an_answer_begins_the_idle_time_anew_too(world):
    vm = await drowsy(world, VM_COMMAND_TIMEOUT_S=1)
    await world.clock.advance(IDLE - 2)
    vm.holds()
    await world.text("hello")
    await world.clock.advance(IDLE - 2)
    assert not world.fly.count("suspend_machine")


async def test_the_machine_is_started_beside_the_fsync_of_the_text(world):
    await asleep(world)
    disk = sqlite3.connect(world.database)
    disk.execute("BEGIN IMMEDIATE")
    text = asyncio.ensure_future(world.twilio.texts(ANN, "wake up"))
    await real_until(lambda: world.fly.count("start_machine"))
    assert not text.done()
    disk.rollback()
    disk.close()
    assert (await world.clock.run(text)).status == 200
    await world.hears("ran: wake up")


async def real_until(condition: Callable[[], Any]) -> None:
    """Without letting virtual time run."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_a_start_that_fails_is_an_outage_like_any_other(world):
    vm = await asleep(world)
    world.fly.fails("start_machine", 500, times=10_000)
    await world.text("wake up")
    await world.hears(RESTARTING)
    assert await state_of(world, vm) == "away"
    world.fly.heals("start_machine")
    await world.hears(RESTARTING, "ran: wake up", within=200)
    assert await state_of(world, vm) == "ready"


async def test_a_sleeper_that_answers_by_itself_was_woken_by_somebody_else(world):
    vm = await asleep(world)
    world.fly.fails("start_machine", 500, times=10_000)
    await world.text("wake up")
    await world.hears(RESTARTING)
    world.fly.rests(vm, "")
    await world.hears(RESTARTING, "ran: wake up", within=200)
    assert await state_of(world, vm) == "ready"


async def test_texts_to_thirty_sleepers_at_once_are_all_answered(world):
    world.fly.rate_limited = False
    await world.start(VM_IDLE_S=IDLE, PROVISION_LIMIT=50, VM_LIMIT=0)
    vms = [await world.sign_up(phone) for phone in PHONES]
    await world.clock.until(lambda: all(machine_of(world, vm) == "suspended" for vm in vms), IDLE + 200)
    world.fly.resume_s = 1
    await asyncio.gather(*(world.text("hi", phone) for phone in PHONES))
    await world.clock.until(lambda: all(world.twilio.sent_to(phone) for phone in PHONES))
    assert {tuple(world.twilio.sent_to(phone)) for phone in PHONES} == {("ran: hi",)}


@pytest.mark.parametrize("body", ["STOP", "cockpit status", "cockpit help", "cockpit queue"])
async def test_what_is_not_run_wakes_nobody(world, body):
    vm = await asleep(world)
    await world.text(body)
    await world.clock.advance(5)
    assert not world.fly.count("start_machine")
    assert machine_of(world, vm) == "suspended"


async def test_a_refused_text_wakes_nobody(world):
    vm = await drowsy(world, TEXT_LIMIT=1)
    await falls_asleep(world, vm)
    await world.text("cockpit status")
    await world.text("one too many")
    await world.clock.advance(5)
    assert not world.fly.count("start_machine")


async def test_a_text_that_is_found_too_late_to_be_run_wakes_nobody(world):
    await asleep(world, BACKFILL_S=60, VM_AWAY_LIMIT_S=100)
    await world.stop()
    world.twilio.missed(ANN, "too old")
    world.clock.elapsed += 300
    await world.start()
    await world.hears('Not run, your VM was away too long: "too old"')
    await world.clock.advance(5)
    assert not world.fly.count("start_machine")


async def test_the_status_of_a_sleeper_says_so(world):
    await asleep(world)
    await world.text("cockpit status")
    await world.hears("Your VM is asleep. Nothing is running. 0 waiting.")


# What else wakes it, and what does not

@pytest.mark.parametrize("method, path, body", [("PATCH", "", {"github_token": "ghp_new"}), ("POST", "/restart", None), ("POST", "/upgrade", None)])
async def test_a_change_of_a_sleeper_starts_it_first(world, method, path, body):
    vm = await asleep(world)
    answer = await world.call(method, f"/provision/{vm.app}{path}", json=body)
    assert (answer.status, answer.body["state"]) == (200, "ready")
    changed = "restart_machine" if path == "/restart" else "update_machine"
    started, = world.fly.calls("start_machine")
    assert started.at <= world.fly.calls(changed)[0].at
    assert machine_of(world, vm) == "started"


async def test_a_change_that_comes_while_it_is_being_suspended_waits_for_that(world):
    vm = await drowsy(world)
    gate = world.fly.holds("suspend_machine")
    await world.clock.until(gate.arrived.is_set, IDLE + 20)
    change = asyncio.ensure_future(world.ask("POST", f"/provision/{vm.app}/restart"))
    await world.clock.advance(3)
    assert not world.fly.count("start_machine")
    assert not world.fly.count("restart_machine")
    gate.open()
    assert (await world.clock.run(change)).status == 200
    assert await state_of(world, vm) == "ready"


async def picture_link(world, vm: FakeVM) -> str:
    """The address of a picture that the VM sent, on the gateway."""
    world.vms.images["x.png"] = ("image/png", PNG)
    await world.call("POST", "/messages", key=vm.env["COCKPIT_TOKEN"], json={"images": ["/images/x.png"]})
    await world.clock.until(lambda: world.twilio.media_sent)
    return world.twilio.media_sent[0]


async def test_a_picture_of_a_sleeper_that_is_fetched_wakes_it(world):
    vm = await drowsy(world)
    link = await picture_link(world, vm)
    await falls_asleep(world, vm)
    world.fly.resume_s = 8
    status, content, _ = await world.clock.run(fetch(world, link))
    assert (status, content) == (200, PNG)
    assert await state_of(world, vm) == "ready"


async def test_a_picture_of_a_sleeper_that_does_not_wake_in_time_is_503(world):
    vm = await drowsy(world)
    link = await picture_link(world, vm)
    await falls_asleep(world, vm)
    world.fly.resume_s, began = 30, world.clock.elapsed
    answer = await world.call("GET", link.removeprefix(PUBLIC), key=None)
    assert (answer.status, answer.body["code"]) == (503, "fly_unavailable")
    assert "Retry-After" in answer.headers
    assert 9 < world.clock.elapsed - began < 11


async def test_a_message_of_a_sleeper_s_own_says_that_it_is_awake(world):
    vm = await asleep(world)
    world.fly.rests(vm, "")
    await world.call("POST", "/messages", key=vm.env["COCKPIT_TOKEN"], json={"text": "cron says hello"})
    assert await state_of(world, vm) == "ready"
    assert not world.fly.count("start_machine")


async def test_a_message_that_a_vm_sent_while_it_was_being_frozen_does_not_say_that_it_is_awake(world):
    vm = await drowsy(world)
    world.fly.freeze_s = 3
    await world.clock.until(lambda: machine_of(world, vm) == "suspending", IDLE + 30)
    answer = await world.ask("POST", "/messages", key=vm.env["COCKPIT_TOKEN"], json={"text": "good night"})
    assert answer.status == 202
    await world.clock.advance(10)
    assert (await state_of(world, vm), machine_of(world, vm)) == ("asleep", "suspended")
    await world.text("wake up")
    await world.hears("good night", "ran: wake up")


async def test_a_refused_suspension_is_told_and_tried_again_in_an_hour(world, caplog):
    vm = await drowsy(world)
    world.fly.fails("suspend_machine", 422)
    await world.clock.advance(3000)
    assert world.fly.count("suspend_machine") == 1
    assert await state_of(world, vm) == "ready"
    assert "vm_not_suspended" in caplog.messages
    await world.clock.until(lambda: machine_of(world, vm) == "suspended", 1000)


async def test_a_suspension_of_unknown_outcome_counts_as_asleep(world):
    vm = await drowsy(world)
    world.fly.drops("suspend_machine", after=True)
    await falls_asleep(world, vm)
    await world.text("wake up")
    await world.hears("ran: wake up")


async def test_a_suspension_that_did_not_happen_after_all_is_seen_by_a_sweep(world):
    vm = await drowsy(world, RECONCILE_S=EVERY)
    world.fly.drops("suspend_machine")
    await world.clock.until(lambda: world.saved["routes"][ANN]["state"] == "asleep", IDLE + 20)
    assert machine_of(world, vm) == "started"
    await sweeps(world, 1)
    assert await state_of(world, vm) == "ready"


async def test_a_teardown_of_a_sleeper_leaves_nothing(world):
    vm = await asleep(world)
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    assert not world.fly.apps


# The sweep

@pytest.mark.parametrize("rests, state", [("suspended", "asleep"), ("stopped", "asleep"), ("suspending", "asleep"), ("", "ready")])
async def test_a_sweep_leaves_a_sleeper_alone_and_sees_one_that_is_awake(world, rests, state):
    vm = await asleep(world, RECONCILE_S=EVERY)
    world.fly.freeze_s = 1e9
    machine, = world.fly.apps[vm.app].machines.values()
    machine.rest, machine.freezes_at = rests, 1e9
    await sweeps(world, 1)
    assert await state_of(world, vm) == state
    assert not world.fly.count("start_machine")
    machine.rest = machine.rest and "suspended"


async def test_a_vm_that_somebody_suspended_at_fly_is_started(world):
    vm = await world.ready(RECONCILE_S=EVERY)
    world.fly.rests(vm, "suspended")
    await sweeps(world, 1)
    assert machine_of(world, vm) == "started"


async def test_a_sleeper_is_never_probed(world):
    vm = await asleep(world, RECONCILE_S=EVERY)
    asked = vm.asked_asleep
    await world.clock.advance(1000)
    await world.restart()
    await world.clock.advance(200)
    assert vm.asked_asleep == asked, "a probe would wake it"
    assert machine_of(world, vm) == "suspended"


async def test_a_vm_adopted_while_it_sleeps_is_asleep(world):
    vm = await asleep(world)
    await world.stop()
    for file in world.file.parent.iterdir():
        file.unlink()
    await world.start()
    assert await state_of(world, vm) == "asleep"
    await world.text("wake up")
    await world.hears("ran: wake up")


# Killed

@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("fake, call, after", FALLING)
async def test_a_kill_at_any_instant_of_falling_asleep_ends_in_agreement_with_fly(world, fake, call, after, with_text):
    vm = await drowsy(world)
    gate = getattr(world, fake).holds(call, after=after)
    await world.clock.until(gate.arrived.is_set, IDLE + 20)
    if with_text:
        await world.text("wake up")
    await world.crash_and_restart(RECONCILE_S=EVERY)
    await sweeps(world, 1)
    if with_text:
        await world.hears("ran: wake up")
        assert vm.ran == ["wake up"]
    else:
        assert not vm.asked_asleep, "a probe would wake it"
    assert (await state_of(world, vm), machine_of(world, vm)) in (("asleep", "suspended"), ("ready", "started"))


@pytest.mark.parametrize("fake, call, after", [("fly", "start_machine", False), ("fly", "start_machine", True), ("vms", "health", False),
                                               ("vms", "command", False), ("vms", "command", True)])
async def test_a_kill_at_any_instant_of_waking_loses_no_text(world, fake, call, after):
    vm = await asleep(world)
    gate = getattr(world, fake).holds(call, after=after)
    await world.text("wake up")
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart(RECONCILE_S=EVERY)
    await world.hears("ran: wake up")
    assert vm.ran == ["wake up"]
    await sweeps(world, 1)
    assert (await state_of(world, vm), machine_of(world, vm)) == ("ready", "started")


async def test_a_change_of_a_sleeper_that_was_killed_is_ended_by_the_next_start(world):
    vm = await asleep(world)
    gate = world.fly.holds("start_machine")
    asyncio.ensure_future(world.ask("POST", f"/provision/{vm.app}/restart")).add_done_callback(lambda done: done.exception())
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart()
    await world.clock.until(lambda: world.fly.count("restart_machine"))
    await world.clock.settle()
    assert await state_of(world, vm) == "ready"


# What it costs

async def awake_seconds(world) -> float:
    found = re.search(r"^cockpit_vm_awake_seconds_total ([0-9.]+)$", (await world.call("GET", "/metrics")).text, re.MULTILINE)
    return float(found[1])


async def test_the_time_awake_is_counted_also_across_restarts_and_teardowns(world):
    vm = await drowsy(world)
    await falls_asleep(world, vm)
    slept_at = await awake_seconds(world)
    assert IDLE <= slept_at <= IDLE + 20
    await world.clock.advance(1000)
    assert await awake_seconds(world) == slept_at
    assert abs((await world.call("GET", f"/provision/{vm.app}")).body["awake_s"] - slept_at) <= 1
    await world.text("wake up")
    await world.clock.advance(30)
    await world.restart()
    await world.clock.advance(10)
    assert abs(await awake_seconds(world) - slept_at - 40) <= 2
    before = await awake_seconds(world)
    await world.call("DELETE", f"/provision/{vm.app}")
    assert abs(await awake_seconds(world) - before) <= 2, "what was spent stays spent"
    await world.restart()
    assert abs(await awake_seconds(world) - before) <= 2


async def test_a_route_of_the_first_version_was_awake_since_it_was_made(world):
    vm = await world.ready()
    await world.stop()
    stored = world.saved
    del stored["routes"][ANN]["awake_since"]
    stored["routes"][ANN]["created_at"] = "2026-11-22T19:00:00Z"
    world.file.write_text(json.dumps(stored))
    await world.start()
    assert 3600 <= (await world.call("GET", f"/provision/{vm.app}")).body["awake_s"] < 3700
    assert 3600 <= await awake_seconds(world) < 3700


# --- HTTP ---

CALLS = [("POST", "/provision"), ("GET", "/provision"), ("GET", "/provision/cockpit-vm-aaaaaaaa"), ("PATCH", "/provision/cockpit-vm-aaaaaaaa"),
         ("DELETE", "/provision/cockpit-vm-aaaaaaaa"), ("POST", "/provision/cockpit-vm-aaaaaaaa/restart"), ("POST", "/provision/cockpit-vm-aaaaaaaa/upgrade")]


@pytest.mark.parametrize("headers", [
    {}, {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer "}, {"Authorization": KEY}, {"Authorization": "Bearer é"},
    {"Authorization": f"Basic {KEY}"}, {"X-API-Key": KEY.upper()}, {"X-API-Key": ""}, {"Cookie": f"key={KEY}"}], ids=str)
async def test_nothing_under_provision_is_answered_without_the_key(world, headers):
    await world.start()
    for method, path in CALLS:
        answer = await world.call(method, f"{path}?api_key={KEY}", key=None, headers=headers, json=sign_up_form())
        assert (answer.status, answer.headers["WWW-Authenticate"].split()[0], answer.body["code"]) == (401, "Bearer", "unauthorized"), (method, path)
    assert not world.fly.count("create_app")


async def test_a_wrong_path_or_method_under_provision_tells_nothing_without_the_key(world):
    await world.start()
    for method, path in (("PUT", "/provision"), ("OPTIONS", "/provision"), ("POST", "/provision/x"), ("GET", "/provision/x/restart"), ("GET", "/provision/"), ("GET", "/provision/x/y")):
        assert (await world.call(method, path, key=None)).status == 401, (method, path)


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}, {"Authorization": "bearer the-next-key-while-rotating"}], ids=str)
async def test_each_key_in_the_list_opens_by_either_header(world, headers):
    await world.start(COCKPIT_API_KEY=f"{KEY},the-next-key-while-rotating")
    assert (await world.call("GET", "/provision", key=None, headers=headers)).status == 200


def form_with(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (sign_up_form() | changes).items() if value is not ...}


@pytest.mark.parametrize("name, value", [
    *(("phone_number", value) for value in (..., None, "", 15551234567, "555", "+05551234567", NUMBER, "+1 (555) 000-0000")),
    *(("github_token", value) for value in (..., None, "", 5, "a\nb", "x" * 9000)),
    *(("api_keys", value) for value in (
        ..., None, {}, [], "KEY", {"lower": "x"}, {"1KEY": "x"}, {"A-B": "x"}, {"": "x"}, {"PATH": "x"}, {"HOME": "x"}, {"PORT": "x"}, {"HOST": "x"}, {"GITHUB_TOKEN": "x"},
        {"NODE_OPTIONS": "x"}, {"BASH_ENV": "x"}, {"LD_PRELOAD": "x"}, {"PYTHONPATH": "x"}, {"FLY_APP_NAME": "x"}, {"COCKPIT_TOKEN": "x"}, {"A": 5}, {"A": None},
        {"A": "x\x00"}, {"A": "x\ny"}, {"A": "x" * 8193}, {"A": "é" * 4097}, {f"K{n}": "x" for n in range(51)})),
    ("region", "not a region!"), ("region", 5), ("welcome", "yes"), ("verify", "yes"), ("verify", 1)], ids=lambda value: str(value)[:30])
async def test_an_invalid_field_is_422_under_its_name_and_fly_is_not_asked(world, name, value):
    await world.start()
    asked = len(world.fly.seen)
    answer = await world.call("POST", "/provision", json=form_with(**{name: value}))
    assert (answer.status, answer.body["code"]) == (422, "invalid_request")
    assert answer.body["errors"] and all(re.match(rf"{name}\b", error["field"]) and error["message"] for error in answer.body["errors"]), answer.body["errors"]
    assert len(world.fly.seen) == asked and not world.saved.get("routes")


async def test_all_invalid_fields_are_named_at_once(world):
    await world.start()
    answer = await world.call("POST", "/provision", json={})
    assert {error["field"] for error in answer.body["errors"]} == {"phone_number", "github_token", "api_keys"}


async def test_the_largest_valid_sign_up_is_accepted(world):
    await world.start()
    keys = {f"KEY_{n}": "v" * 8192 for n in range(50)}
    vm = await world.sign_up(api_keys=keys)
    assert {name: vm.env[name] for name in keys} == keys


@pytest.mark.parametrize("method, path, more, status, code", [
    ("POST", "/provision", {"data": "{"}, 400, "malformed"), ("POST", "/provision", {"data": b"\xff\xfe"}, 400, "malformed"),
    ("POST", "/provision", {"data": "a=b", "headers": {"Content-Type": "application/x-www-form-urlencoded"}}, 415, "unsupported_media_type"),
    ("POST", "/provision", {"data": b"no gzip", "headers": {"Content-Encoding": "gzip"}}, 415, "unsupported_media_type"),
    ("POST", "/provision", {"data": b"[" * 300_000}, 400, "malformed"), ("POST", "/provision", {"data": b" " * (512 * 1024 + 1)}, 413, "too_large"),
    ("POST", "/sms", {"data": b"Body=" + b"x" * (64 * 1024), "headers": {"Content-Type": "application/x-www-form-urlencoded"}}, 413, "too_large"),
    ("GET", "/nothing/here", {}, 404, "not_found"), ("GET", "/provision/cockpit-vm-aaaaaaaa", {}, 404, "unknown_vm"), ("DELETE", "/provision/nobody", {}, 404, "unknown_vm"),
    ("PUT", "/provision", {}, 405, "method_not_allowed"), ("GET", "/sms", {}, 405, "method_not_allowed"), ("DELETE", "/health", {}, 405, "method_not_allowed")])
async def test_every_error_is_a_problem_with_a_stable_code(world, method, path, more, status, code):
    await world.start()
    headers = {"Content-Type": "application/json"} | more.pop("headers", {}) if "data" in more else {}
    answer = await world.call(method, path, headers=headers, **more)
    assert (answer.status, answer.headers["Content-Type"].split(";")[0]) == (status, "application/problem+json"), answer.text
    assert (answer.body["status"], answer.body["code"]) == (status, code) and {"type", "title", "detail"} <= set(answer.body)
    assert status != 405 or answer.headers["Allow"]


@pytest.mark.parametrize("headers", [{}, {"Host": "cockpit.example.com", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "cockpit.example.com", "Forwarded": "host=a"}])
async def test_a_webhook_twilio_did_not_sign_is_403_and_reaches_nobody(world, headers):
    vm = await world.ready()
    form = {"MessageSid": "SM" + "1" * 32, "AccountSid": ACCOUNT, "From": ANN, "To": NUMBER, "Body": "hello", "NumMedia": "0"}
    good, other = sign(PUBLIC + "/sms", form), form | {"AccountSid": "AC" + "f" * 32}
    for sent, signature in ((form, ""), (form, good[:-1]), (form, good.lower()), (form | {"Body": "tampered"}, good), (form | {"Extra": ""}, good),
                            (form, sign(PUBLIC + "/sms", form, "another-token")), (form, sign(PUBLIC + "/sms/", form)), (form, sign(world.twilio.gateway + "/sms", form)),
                            (other, sign(PUBLIC + "/sms", other))):
        answer = await world.twilio.posts("/sms", sent, signature, headers)
        assert (answer.status, answer.body["code"]) == (403, "bad_signature")
    await world.clock.advance(2)
    assert not vm.asked and not world.twilio.sent


@pytest.mark.parametrize("headers", [{}, {"Host": "evil.example.com"}, {"X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example.com:1"}])
async def test_a_signed_webhook_is_taken_whatever_the_proxy_says(world, headers):
    vm = await world.ready()
    form = {"MessageSid": "SM" + "1" * 32, "AccountSid": ACCOUNT, "From": ANN, "To": NUMBER, "Body": "hello", "NumMedia": "0", "FromCity": ""}
    path = "/sms?tenant=a%2Bb&x="
    assert (await world.twilio.posts(path, form, sign(PUBLIC + path, form), headers)).status == 200
    await world.clock.until(lambda: vm.ran == ["hello"])


@pytest.mark.parametrize("asks", [{"Prefer": "respond-async"}, {"Accept": "text/event-stream"}, {}])
async def test_where_a_record_is_told_with_the_prefix_of_the_url(world, asks):
    await world.start(PUBLIC_URL=PUBLIC + "/gate")
    answer = await world.call("POST", "/provision", json=sign_up_form(), headers=asks)
    assert re.fullmatch("/gate/provision/cockpit-vm-[a-z2-7]{8}", answer.headers["Location"])


async def test_either_token_signs_while_rotating_and_a_prefix_of_the_url_too(world):
    await world.start(TWILIO_AUTH_TOKEN=f"the-next-token,{AUTH_TOKEN}", PUBLIC_URL=PUBLIC + "/gw", TWILIO_API_KEY="SK" + "1" * 32, TWILIO_API_SECRET="s")
    form = {"MessageSid": "SM" + "1" * 32, "AccountSid": ACCOUNT, "From": EVE, "To": NUMBER, "Body": "hello"}
    for token, status in (("the-next-token", 200), (AUTH_TOKEN, 200), ("s", 403)):
        assert (await world.twilio.posts("/sms", form, sign(PUBLIC + "/gw/sms", form, token))).status == status


async def test_health_counts_and_names_nobody(world):
    await world.ready()
    answer = await world.call("GET", "/health", key=None)
    assert answer.status == 200 and isinstance(answer.body, dict)
    assert "1555" not in answer.text and ANN[-4:] not in answer.text


async def test_the_front_page_is_a_page_and_shows_no_number_without_the_key(world):
    vm = await world.ready()
    answer = await world.call("GET", "/", key=None)
    assert (answer.status, answer.headers["Content-Type"].split(";")[0]) == (200, "text/html") and "cockpit" in answer.text.lower()
    assert ANN not in answer.text and vm.app not in answer.text


async def test_the_list_of_vms_is_paged(world):
    await world.start()
    vm_ids = {(await world.sign_up(phone)).app for phone in PHONES[:5]}
    found, after, pages = [], "", 0
    while after is not None:
        page = (await world.call("GET", f"/provision?limit=2&after={after}")).body
        found, after, pages = found + page["vms"], page["next"], pages + 1
    assert {vm["vm_id"] for vm in found} == vm_ids and len(found) == 5 and pages == 3
    assert (await world.call("GET", "/provision?limit=none")).status == 422


async def test_credentials_are_in_no_answer_and_no_file(world):
    vm = await world.ready()
    world.fly.fails("create_machine", 400)
    said = [(await world.provision(BOB)).text, (await world.provision()).text]
    said += [(await world.call("GET", path)).text for path in ("/provision", f"/provision/{vm.app}", "/health", "/")]
    said += [(await world.call("POST", "/provision", json=sign_up_form("bad"))).text, (await world.call("POST", "/provision", json={"github_token": [GITHUB]})).text]
    said += [file.read_bytes().decode("latin-1") for file in world.file.parent.iterdir()]
    assert not [secret for secret in (*SECRETS, vm.env["COCKPIT_TOKEN"]) if any(secret in text for text in said)]


def webhook(form: dict[str, str], *lines: str, version: str = "1.1") -> bytes:
    """A signed webhook as it goes on the wire."""
    body = urlencode(form)
    head = ["POST /sms HTTP/" + version, "Host: gateway", "Content-Type: application/x-www-form-urlencoded", f"Content-Length: {len(body)}",
            f"X-Twilio-Signature: {sign(PUBLIC + '/sms', form)}", *lines]
    return "".join(f"{line}\r\n" for line in head).encode() + b"\r\n" + body.encode()


def text_form(n: int) -> dict[str, str]:
    return {"MessageSid": f"SM{n:032}", "AccountSid": ACCOUNT, "From": ANN, "To": NUMBER, "Body": f"text {n}", "NumMedia": "0"}


async def connect(world):
    address = cockpit.URL(world.twilio.gateway)
    return await asyncio.open_connection(address.host, address.port)


@pytest.mark.parametrize(("version", "connection", "stays"), [
    ("1.1", "", True), ("1.1", "keep-alive", True), ("1.1", "close", False), ("1.0", "", False), ("1.0", "keep-alive", True)])
async def test_a_text_is_acknowledged_in_whatever_way_the_connection_is_kept(world, version, connection, stays):
    vm = await world.ready()
    reader, writer = await connect(world)
    for n in range(1 + stays):
        writer.write(webhook(text_form(n), f"Fly-Request-Id: request-{n}", *([f"Connection: {connection}"] if connection else []), version=version))
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = dict(line.split(": ", 1) for line in lines)
        assert status == f"HTTP/{version} 200 OK" and len(headers) == len(lines)
        assert (headers["Content-Type"], headers["X-Request-Id"]) == ("text/xml; charset=utf-8", f"request-{n}")
        assert abs(parsedate_to_datetime(headers["Date"]).timestamp() - time.time()) < 60
        said = await reader.readexactly(int(headers["Content-Length"]))
        assert ElementTree.fromstring(said).tag == "Response" and not list(ElementTree.fromstring(said))
        assert headers.get("Connection", "keep-alive" if version == "1.1" else "close") == ("keep-alive" if stays else "close")
    if not stays:
        assert await reader.read() == b""
    writer.close()
    await world.clock.until(lambda: vm.ran == [f"text {n}" for n in range(1 + stays)])


@pytest.mark.parametrize("known", [0, 2, 4])
async def test_texts_sent_in_one_go_are_acknowledged_in_their_order(world, known):
    await world.ready()
    for n in range(known):
        await world.text(f"text {n}", MessageSid=text_form(n)["MessageSid"])
    reader, writer = await connect(world)
    writer.write(b"".join(webhook(text_form(n), f"Fly-Request-Id: request-{n}") for n in range(4)) + b"GET /nowhere HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")
    heard = await reader.read()
    assert re.findall(rb"HTTP/1.1 (\d+)", heard) == [b"200"] * 4 + [b"404"]
    assert re.findall(rb"X-Request-Id: (request-\d)", heard) == [b"request-%d" % n for n in range(4)]
    writer.close()


async def test_a_caller_who_hangs_up_before_the_acknowledgement_leaves_a_text_that_runs(world, caplog):
    vm = await world.ready()
    disk = sqlite3.connect(f"{world.file}.db", isolation_level=None)
    disk.execute("BEGIN IMMEDIATE")
    others = len(world.server.connections)
    _, writer = await connect(world)
    writer.write(webhook(text_form(0)))
    while not is_writing(world.server.runner.app[cockpit.GATEWAY].messages):
        await asyncio.sleep(0)
    writer.transport.abort()
    while len(connections := world.server.connections) > others and all(connection.transport for connection in connections):
        await asyncio.sleep(0)
    assert not vm.ran
    disk.execute("ROLLBACK")
    disk.close()
    await world.hears("ran: text 0")
    assert vm.ran == ["text 0"] and not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_the_description_holds_every_route_every_code_and_every_field_of_a_record(world):
    await world.ready()
    document = (await world.call("GET", "/openapi.json", key=None)).body
    router = world.server.runner.app.router
    routes = {(route.method.lower(), route.resource.canonical) for route in router.routes()} - {("head", resource.canonical) for resource in router.resources()}
    assert routes == {(method, path) for path, calls in document["paths"].items() for method in calls}
    assert document["servers"] == [{"url": PUBLIC}]
    schemas = document["components"]["schemas"]
    assert schemas["Problem"]["properties"]["code"]["enum"] == list(cockpit.STATUS_OF)
    record, = (await world.call("GET", "/provision")).body["vms"]
    assert set(schemas["VM"]["required"]) <= set(record) <= set(schemas["VM"]["properties"])


async def test_what_the_description_locks_is_answered_401_without_a_key(world):
    vm = await world.ready(METRICS_TOKEN="prometheus")
    for path, calls in API["paths"].items():
        for method, call in calls.items():
            answer = await world.call(method.upper(), re.sub("{.*?}", vm.app, path), key=None)
            assert (answer.status == 401) == bool(call["security"]), (method, path, answer.status)


def examples(schema: dict[str, Any]) -> list[Any]:
    """Values that a schema accepts."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    of_kind = {"string": schema.get("examples", ["words"]), "object": schema.get("examples"), "array": [[], *schema.get("examples", [])], "boolean": [True, False], "null": [None],
               "integer": [schema.get("minimum"), schema.get("maximum")]}
    return [value for kind in kinds for value in of_kind[kind]]


def misfits(schema: dict[str, Any]) -> list[Any]:
    """Values that a schema refuses: of another type, out of its pattern, size or names."""
    found = [value for kind, value in (("string", "words"), ("integer", 5), ("boolean", True), ("null", None), ("object", {"words": 5}), ("array", [5])) if kind not in schema["type"]]
    if "pattern" in schema:
        found += [value for value in ("a\nb", "!", "", "x" * 9000) if not re.search(schema["pattern"], value) or not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 9999)]
    found += [[5], ["/etc/passwd"], [{"url": "/images/.."}], ["/images/a.png"] * (schema["maxItems"] + 1)] if "maxItems" in schema else []
    if inner := schema.get("additionalProperties"):
        found += [{}, {f"K{n}": "x" for n in range(schema["maxProperties"] + 1)}, {"words": "x"}, {"PATH": "x"}, *({"KEY": value} for value in misfits(inner))]
    return found


@pytest.mark.parametrize("method, path", [("POST", "/provision"), ("PATCH", "/provision/{vm_id}"), ("POST", "/messages")])
async def test_a_body_is_accepted_or_refused_as_the_description_says(world, method, path):
    vm = await world.ready(VM_LIMIT=500)
    key, phones = vm.env["COCKPIT_TOKEN"] if path == "/messages" else KEY, itertools.count(15551112000)
    body = operation(method, path)["requestBody"]["content"]["application/json"]["schema"]
    fields = body["properties"]

    async def send(form: dict[str, Any]) -> Answer:
        if form.get("phone_number") == ANN:
            form |= {"phone_number": f"+{next(phones)}"}
        return await world.call(method, path.replace("{vm_id}", vm.app), key=key, json=form)

    whole = {name: examples(schema)[-1] for name, schema in fields.items()}
    for name, schema in fields.items():
        for value in examples(schema):
            answer = await send(whole | {name: value})
            assert answer.status in (200, 201, 202), (name, value, answer.text)
        for value in misfits(schema):
            answer = await send(whole | {name: value})
            assert answer.status == 422 and {error["field"].partition(".")[0] for error in answer.body["errors"]} == {name}, (name, value, answer.text)
        answer = await send({field: value for field, value in whole.items() if field != name})
        assert answer.status == (422 if name in body["required"] else answer.status) and answer.status in (200, 201, 202, 422), (name, answer.text)
        assert name in body["required"] or answer.status != 422, (name, answer.text)
    assert not body["additionalProperties"] and (await send(whole | {"more": 1})).body["errors"][0]["field"] == "more"
    assert body["minProperties"] == 1 and (await send({})).status == 422


def test_the_description_of_a_phone_number_is_what_is_checked():
    def is_one(text: str) -> bool:
        with contextlib.suppress(ValueError):
            return bool(cockpit.normalise_phone(text))
        return False

    pattern = cockpit.ORDER_FIELDS["phone_number"]["pattern"]
    written = ["+", "555", ANN, "15551234567", "+05551234567", "+1 (555) 123-45.67", "( +1", *("+" + "1" * n for n in range(5, 18)), "+1555123456\u0667", ANN + "x", "x" + ANN, "++15551234567"]
    assert [text for text in written if is_one(text)] == [text for text in written if re.search(pattern, text)] != []


async def test_a_page_of_the_list_is_as_long_as_the_description_allows(world):
    await world.start()
    limit, after = operation("GET", "/provision")["parameters"]
    statuses = {value: (await world.call("GET", f"/provision?limit={value}")).status for value in (*examples(limit["schema"]), 0, 1001, -1, "words", 1.5)}
    assert statuses == {"1": 200, "1000": 200, 0: 422, 1001: 422, -1: 422, "words": 422, 1.5: 422}
    assert (await world.call("GET", f"/provision?{after['name']}=x")).status == 200 and (await world.call("GET", "/provision?more=x")).status == 422


# --- Doors ---

def rss(child: Child, which: str = "VmRSS") -> float:
    """Resident memory in MB, now or (VmHWM) at most so far."""
    return int(re.search(which + r":\s+(\d+)", Path(f"/proc/{child.process.pid}/status").read_text())[1]) / 1024


@beside
async def test_what_is_refused_leaves_no_memory_behind(live):
    child = await live.spawn()
    vm = await live.sign_up()
    before = rss(child)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for _ in range(400):
        async with live.session.post(child.url + "/sms", data=b"a=" + b"b" * 65_000, headers=form) as response:
            assert response.status == 403
    for _ in range(100):
        sent = {"text": "x" * 200_000, "nonsense": 1}
        async with live.session.post(child.url + "/messages", json=sent, headers={"Authorization": f"Bearer {vm.env['COCKPIT_TOKEN']}"}) as response:
            assert response.status == 422
    assert rss(child) - before < 20


@beside
async def test_packed_bodies_are_refused_unopened(live):
    child = await live.spawn()
    bomb = zlib.compress(b"0" * (50 << 20))
    for path in ("/sms", "/provision", "/messages", "/health") * 3:
        headers = {"Content-Encoding": "deflate", "Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        with contextlib.suppress(aiohttp.ClientError):
            async with live.session.post(child.url + path, data=bomb, headers=headers) as response:
                assert response.status in (401, 405, 415)
        began = time.monotonic()
        assert (await live.ask("GET", "/health")).status == 200
        assert time.monotonic() - began < 0.5


@beside
async def test_a_body_that_never_ends_is_closed_and_not_kept(live):
    child = await live.spawn()
    reader, writer = await asyncio.open_connection("127.0.0.1", child.port)
    writer.write(b"POST /sms HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 60000\r\n\r\na=b")
    async with asyncio.timeout(15):
        assert b"400" in await reader.readline()
        await reader.read()
    writer.close()


@beside
async def test_bodies_behind_one_another_are_left_to_the_network_until_their_turn(live):
    child = await live.spawn()
    before = rss(child)
    head = b"POST /sms HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 60000\r\n\r\n"
    writers = [(await asyncio.open_connection("127.0.0.1", child.port))[1] for _ in range(100)]
    child.process.send_signal(signal.SIGSTOP)  # what waits in the network then comes at once
    for writer in writers:
        writer.write((head + b"x" * 60_000) * 30)
    child.process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(30):
        while 'code="bad_signature"} 3000' not in (await live.ask("GET", "/metrics")).text:
            await asyncio.sleep(0.1)
    assert rss(child, "VmHWM") - before < 60
    for writer in writers:
        writer.transport.abort()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone ends such connections")
async def test_who_reads_no_answer_does_not_stay(world, monkeypatch):
    monkeypatch.setattr(cockpit, "UNREAD_MS", 500)
    await world.start()
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect(("127.0.0.1", world.server.port))
        caller.setblocking(False)
        others = len(world.server.connections)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while True:
                    await asyncio.get_running_loop().sock_sendall(caller, b"GET / HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\n\r\n" * 100)
            while len(world.server.connections) > others:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("flood", [b"HTTP/1.1 100 Continue\r\nX: " + b"x" * 500 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 5000 + b"\r\n"], ids=["continue", "heads"])
async def test_a_vm_that_answers_without_end_is_cut_off(world, flood):
    vm = await world.ready()

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(flood * 500)
                await writer.drain()

    server = await asyncio.start_server(pour, "127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        gateway = world.server.runner.app[cockpit.GATEWAY]
        route = cockpit.Route(vm_id=vm.app, vm_url=url)
        began = time.monotonic()
        outcome = (await asyncio.gather(gateway.vms.command(route, "SM1", {"text": "hello", "media": []}), return_exceptions=True))[0]
        assert isinstance(outcome, cockpit.VmAway) or outcome.is_unreadable
        assert time.monotonic() - began < 8
    finally:
        server.close()


async def test_a_signed_webhook_cut_anew_is_refused(world):
    """Twilio's signature is over names and values without borders: `Body` and its value may be cut elsewhere."""
    vm = await world.ready()
    sid = "SM" + "a" * 32
    form = {"AccountSid": ACCOUNT, "Body": "deploy", "From": ANN, "MessageSid": sid, "NumMedia": "0", "To": NUMBER}
    whole = await world.twilio.posts("/sms", form)
    assert whole.status == 200
    signature = sign(PUBLIC + "/sms", form)
    other = {name: value for name, value in form.items() if name != "NumMedia"} | {"MessageSid": sid + "NumMedia0"}
    assert "".join(name + other[name] for name in sorted(other)) == "".join(name + form[name] for name in sorted(form))
    answer = await world.twilio.posts("/sms", other, signature)
    assert (answer.status, answer.body["code"]) == (403, "bad_signature")
    await world.hears("ran: deploy")
    assert vm.ran == ["deploy"]


async def test_a_link_opens_pictures_and_nothing_else_of_twilio_s(world):
    vm = await world.ready()
    gateway = world.server.runner.app[cockpit.GATEWAY]
    for path in (f"/2010-04-01/Accounts/{ACCOUNT}/Messages.json", f"/2010-04-01/Accounts/{ACCOUNT}.json", "/2010-04-01/Accounts/ACother/Messages/MM1/Media/ME1"):
        link = gateway.keyring.sign_link(vm.app, path, world.clock.now())
        assert (await world.call("GET", f"/media/{link}", key=None)).status == 404
    assert not world.twilio.count("account") and not world.twilio.count("list")


@pytest.mark.parametrize("form", [lambda secret: quote(secret, safe=""), lambda secret: base64.b64encode(secret.encode()).decode(), lambda secret: base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")])
def test_a_credential_is_hidden_in_whatever_form_it_is_echoed(form):
    secret = "a secret+/?>~~ of ours>>>??"
    assert cockpit.redact(f"you sent {form(secret)}", [secret]).rstrip("=") == "you sent [hidden]"


async def test_a_planted_link_in_the_place_of_a_file_of_state_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"{}")
    (tmp_path / "routes.json.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((cockpit.CockpitError, OSError)):
        cockpit.lock_state(tmp_path / "routes.json")


async def test_health_tells_strangers_kinds_and_the_operator_words(world):
    await world.start(RECONCILE_S=10)
    world.fly.fails("list_apps", 401, times=1000)
    await world.clock.advance(30)
    assert (await world.call("GET", "/health", key=None)).body["troubles"] == ["fly"]
    assert "FLY_API_TOKEN" in (await world.call("GET", "/health")).text


async def test_a_silent_cloud_is_a_trouble_and_what_waits_to_be_sent_is_counted(world):
    await world.ready()
    await world.clock.advance(5)
    await world.twilio.server.refuse()
    await world.text("hello")
    await world.clock.advance(100)
    health = (await world.call("GET", "/health")).body
    assert health["sending"] == 1
    assert any("Twilio has not answered" in trouble for trouble in health["troubles"])
    now = await metrics(world)
    assert now["cockpit_messages_waiting"] == {(): 1}
    assert now["cockpit_oldest_message_seconds"][()] > 60
    await world.twilio.server.start()
    await world.hears("ran: hello")
    assert not (await world.call("GET", "/health")).body["troubles"]


# Killed and starved

@pytest.mark.parametrize("fate", ["teardown", "failed set-up"])
async def test_what_an_owner_should_hear_of_the_end_of_a_vm_survives_a_kill(world, fate):
    await world.start()
    if fate == "teardown":
        vm = await world.sign_up()
        await world.text("answered")
        await world.hears("ran: answered")
        gate = await world.occupies(vm, "running")
        await world.text("waiting")
    else:
        gate, job = await world.begin(world.fly, "create_machine", after=True)
        await world.text("early")
        await world.hears("Your VM is being set up. Your text is kept.")
    heard = world.twilio.sent_to(ANN)
    world.twilio.fails("send", 503, times=10000)
    if fate == "teardown":
        assert (await world.call("DELETE", f"/provision/{vm.app}")).status in (202, 204)
        expected = 'Your VM is gone. Not run: "running", "waiting" Sign up: https://signup.example.com'
    else:
        world.fly.fails("wait_machine", 400, times=10)
        gate.open()
        await world.clock.run(asyncio.gather(job, return_exceptions=True))
        expected = 'Your VM could not be set up. Not run: "early"'
    await world.clock.until(lambda: not world.fly.everything)
    await world.clock.settle()
    await world.crash()
    world.twilio.heals("send")
    await world.start()
    await world.hears(*heard, expected)


@pytest.mark.parametrize("calls", range(7))
async def test_a_teardown_killed_at_any_call_is_whole_or_not_begun(world, calls):
    vm = await world.ready()
    vm.away = 503
    await world.text("hello")
    await world.hears(RESTARTING)
    seen = lambda: len(world.fly.seen) + len(world.twilio.seen)
    before = seen()
    asked = asyncio.ensure_future(world.ask("DELETE", f"/provision/{vm.app}"))
    with contextlib.suppress(AssertionError):
        await world.clock.until(lambda: seen() >= before + calls or asked.done(), 30)
    await world.crash_and_restart()
    await asyncio.gather(asked, return_exceptions=True)
    if world.saved["routes"]:
        await world.returns(vm)
        await world.hears(RESTARTING, "ran: hello")
    else:
        await world.hears(RESTARTING, 'Your VM is gone. Not run: "hello" Sign up: https://signup.example.com')
        await world.clock.until(lambda: not world.fly.everything)


async def test_nothing_of_a_vm_that_is_gone_reaches_the_number_s_next_owner_after_a_kill(world):
    vm = await world.ready()
    world.twilio.fails("send", 503, times=10000)
    await world.text("hello")
    await world.clock.until(lambda: vm.ran)
    await world.call("DELETE", f"/provision/{vm.app}")
    await world.sign_up()
    await world.crash()
    world.twilio.heals("send")
    await world.start()
    await world.clock.advance(100)
    assert not world.twilio.sent


@pytest.mark.parametrize("words, answer", [
    ("cockpit status", "Your VM is ready. Nothing is running. 0 waiting."), ("cockpit cancel", "Nothing is waiting. Nothing is running."),
    ("cockpit stop", "Nothing is running."), ("cockpit new", "The next text starts a new conversation."),
    ("cockpit restart", "Your VM is being restarted. What waits will run when it is back.")])
async def test_an_owner_s_command_is_done_once_though_the_gateway_dies_at_once(world, words, answer):
    await world.ready()
    await world.clock.advance(5)
    sid = "SM" + "c" * 32
    assert (await world.twilio.texts(ANN, words, MessageSid=sid)).status == 200
    await world.crash_and_restart()
    assert (await world.twilio.texts(ANN, words, MessageSid=sid)).status == 200
    await world.clock.advance(100)
    assert world.twilio.sent_to(ANN) == [answer]
    assert world.fly.count("restart_machine") == (words == "cockpit restart")


async def test_a_list_of_more_than_20_pages_is_read_on_until_its_end(world):
    vm = await world.ready(QUEUE_LIMIT=1000, VM_AWAY_LIMIT_S=6000)
    await world.clock.advance(5)
    await world.stop()
    world.twilio.page_cap = 2
    for n in range(50):
        world.twilio.missed(ANN, f"missed {n}")
    await world.start(BACKFILL_S=60)
    await world.clock.advance(200)
    assert sorted(vm.ran) == sorted(f"missed {n}" for n in range(50))


async def test_a_missed_text_is_found_behind_more_than_500_pages(world):
    vm = await world.ready(VM_AWAY_LIMIT_S=6000)
    await world.clock.advance(5)
    await world.stop()
    world.twilio.page_cap = 1
    world.twilio.missed(ANN, "missed")
    for n in range(510):
        world.twilio.missed(EVE, f"of a stranger {n}")
    await world.start(BACKFILL_S=60)
    await world.clock.until(lambda: vm.ran == ["missed"])


async def test_fetched_texts_beyond_the_queue_s_limit_stay_in_twilio_s_list_until_there_is_room(world):
    vm = await world.ready(QUEUE_LIMIT=2, VM_AWAY_LIMIT_S=6000)
    await world.clock.advance(5)
    await world.stop()
    vm.away = 503
    for n in range(6):
        world.clock.elapsed += 2
        world.twilio.missed(ANN, f"missed {n}")
    await world.start(BACKFILL_S=60)
    await world.clock.advance(2000)
    assert not vm.ran and len(world.rows("SELECT * FROM texts")) == 3, "the first one is as good as running"
    await world.returns(vm)
    await world.clock.advance(400)
    assert vm.ran == [f"missed {n}" for n in range(6)]
    assert world.twilio.sent_to(ANN) == [RESTARTING, *(f"ran: missed {n}" for n in range(6))]


@pytest.mark.parametrize("skew", [-5, 4, 3600])
async def test_a_gateway_whose_clock_is_wrong_sends_an_answer_once(world, skew):
    world.twilio.skew = skew
    vm = await world.ready()
    await world.text("warm up")
    await world.hears("ran: warm up")
    world.twilio.answers_late("send", 500)
    await world.text("hello")
    await world.clock.until(lambda: world.twilio.count("send") >= 2)
    await world.crash_and_restart(BACKFILL_S=60)
    await world.clock.advance(200)
    assert world.twilio.sent_to(ANN) == ["ran: warm up", "ran: hello"]
    world.twilio.missed(ANN, "missed")
    await world.clock.advance(120)
    assert vm.ran == ["warm up", "hello", "missed"]


async def test_a_picture_that_lies_elsewhere_is_told_of(world):
    vm = await world.ready()
    await world.text("look", NumMedia="1", MediaUrl0="https://elsewhere.example.com/x.png", MediaContentType0="image/png")
    await world.clock.until(lambda: len(world.twilio.sent) == 2)
    assert sorted(world.twilio.sent_to(ANN)) == ["A picture was not passed on: its address is not Twilio's.", "ran: look"]
    path = f"/2010-04-01/Accounts/{ACCOUNT}/Messages/MM1/Media/ME1"
    await world.text("and this", NumMedia="1", MediaUrl0="https://api.twilio.com" + path, MediaContentType0="image/png")
    await world.clock.until(lambda: len(vm.asked) == 2)
    assert [len(command.media) for command in vm.asked] == [0, 1]


async def test_a_failed_command_says_so_and_a_cancelled_one_is_no_failure(world):
    vm = await world.ready()
    vm.answer = lambda text: {"text": "no such file", "images": [], "exitCode": 3, "durationMs": 1}
    await world.text("cat it")
    await world.hears("no such file\nExit code 3.")
    vm.away = 503
    await world.text("wait")
    await world.text("cockpit cancel")
    await world.clock.advance(1)
    assert (await world.call("GET", "/events")).body["fleet"]["hour"][-1][1] == 0


async def test_a_text_behind_a_command_that_timed_out_waits_and_says_so(world):
    vm = await world.ready(VM_COMMAND_TIMEOUT_S=5)
    gate = await world.occupies(vm, "slow")
    await world.text("next")
    await world.clock.advance(6)
    await world.hears('No answer after 5 s; it may still be running: "slow"')
    await world.text("cockpit queue")
    await world.clock.until(lambda: len(world.twilio.sent) == 2)
    assert world.twilio.sent_to(ANN)[1] == 'Waiting for the command before it.\n1. "next"'
    gate.open()
    await world.clock.until(lambda: vm.ran == ["slow", "next"])


async def test_a_restart_by_text_during_a_command_ends_its_wait(world):
    vm = await world.ready()
    await world.clock.advance(5)
    gate = await world.occupies(vm, "hangs")
    await world.text("cockpit restart")
    await world.clock.until(lambda: (world.saved["routes"][ANN].get("change") is None) and world.fly.count("restart_machine"), 60)
    await world.clock.advance(5)
    assert (await world.call("GET", f"/provision/{vm.app}")).body["state"] == "ready"
    assert len(vm.asked) >= 2, "the text goes again, under its key"
    gate.open()
    await world.clock.until(lambda: "ran: hangs" in world.twilio.sent_to(ANN))
    assert vm.ran == ["hangs"]


@pytest.mark.parametrize("body, where", [(b'{"a": 1,\n "b" 2}', "line 2 column 6"), (b"\xff", "utf-8"), (b"[]", "JSON object")])
async def test_bad_json_is_told_with_its_place(world, body, where):
    await world.start()
    answer = await world.call("POST", "/provision", data=body, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.body["code"]) == (400, "malformed")
    assert where in answer.body["detail"]


async def test_what_is_asked_wrongly_is_told_how_to_ask(world):
    await world.start()
    assert "/openapi.json" in (await world.call("GET", "/provisions")).body["detail"]
    assert "not the API key" in (await world.call("GET", "/provision", key="wrong")).body["detail"]
    assert "not the API key" not in (await world.call("GET", "/provision", key=None)).body["detail"]
    unknown = await world.call("GET", "/provision?limt=3")
    assert unknown.body["errors"][0]["field"] == "limt"
    world.fly.fails("create_app", 401)
    refused = await world.provision()
    assert "FLY_API_TOKEN" in refused.body["detail"]
    assert "request_id" not in refused.body


async def test_each_call_to_a_vm_has_a_connection_of_its_own(world):
    """A kept one is only something to flood, or to lose a race on when the other side closes it."""
    await world.ready()
    before = len(world.vms.peers)
    for n in range(3):
        await world.text(f"{n}")
    await world.hears("ran: 0", "ran: 1", "ran: 2")
    assert len(set(world.vms.peers[before:])) == len(world.vms.peers[before:]) == 3


async def test_an_attempt_after_a_cut_takes_a_fresh_connection(world):
    """Not another one that was kept: the other side may be closing that one too."""
    await world.ready()
    await world.sign_up(BOB)
    gate = world.twilio.holds("send")
    await world.text("warm up")
    await world.clock.until(gate.arrived.is_set)
    await world.text("warm up", BOB)
    await world.hears("ran: warm up", phone=BOB)
    gate.open()
    await world.hears("ran: warm up")
    before = len(world.twilio.peers)
    world.twilio.drops("send", after=True)
    await world.text("hello")
    await world.hears("ran: warm up", "ran: hello")
    await world.clock.advance(5)
    after = world.twilio.peers[before + 1:]
    assert after and not set(after) & set(world.twilio.peers[:before + 1])


@beside
async def test_answers_sent_while_the_disk_fails_are_not_sent_again_after_a_kill(live):
    child = await live.spawn()
    phones = PHONES[:6]
    vms = [await live.sign_up(phone) for phone in phones]
    gates = [vm.holds() for vm in vms]
    for phone in phones:
        await live.text("hello", phone)
    for gate in gates:
        await live.clock.until(gate.arrived.is_set)
    _, hard = resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (1, hard))
    for gate in gates:
        gate.open()
    for phone in phones:
        await live.hears("ran: hello", phone=phone)
    await child.ends(signal.SIGKILL)
    await live.spawn()
    await live.text("more", phones[0])
    await live.hears("ran: hello", "ran: more", phone=phones[0])
    assert all(live.twilio.sent_to(phone) == ["ran: hello"] for phone in phones[1:])
    assert all(vm.ran == ["hello"] for vm in vms[1:])


@beside
async def test_a_disk_that_hangs_does_not_hold_up_the_end(live):
    program = "import asyncio, cockpit\nclass Runner:\n    async def cleanup(self):\n        try: await asyncio.sleep(60)\n        finally: await asyncio.sleep(60)\nasyncio.run(cockpit.clean_up(Runner()))"
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert time.monotonic() - began < 10


def test_at_the_limit_of_file_descriptors_one_line_a_minute_is_logged(caplog):
    loop = asyncio.new_event_loop()
    try:
        handler = cockpit.LoopErrors()
        for _ in range(1000):
            handler(loop, {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "Too many open files")})
    finally:
        loop.close()
    assert [record.getMessage() for record in caplog.records] == ["no_file_descriptors"]


@beside
async def test_accepting_goes_on_when_file_descriptors_are_free_again(live):
    child = await live.spawn()
    _, hard = resource.prlimit(child.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(child.process.pid, resource.RLIMIT_NOFILE, (40, hard))
    idle = [await asyncio.open_connection("127.0.0.1", child.port) for _ in range(80)]
    await asyncio.sleep(0.3)
    for _, writer in idle:
        writer.close()
    await asyncio.wait_for(live.ask("GET", "/health"), 8)
    assert child.log.count("\n") < 20, child.log[-2000:]


async def test_a_vm_given_up_that_is_back_at_fly_is_taken_over(world):
    await world.start(RECONCILE_S=EVERY)
    vm = await world.sign_up()
    app = world.fly.everything.pop(vm.app)
    await sweeps(world, 3)
    assert world.saved["routes"][ANN]["state"] == "failed"
    world.fly.everything[vm.app] = app
    await sweeps(world, 3)
    assert world.saved["routes"][ANN]["state"] == "ready"
    await world.text("back again")
    await world.clock.until(lambda: vm.ran == ["back again"])


async def test_a_machine_replaced_with_flyctl_in_our_own_app_is_taken_over(world):
    await world.start(RECONCILE_S=EVERY)
    vm = await world.sign_up()
    machines = world.fly.apps[vm.app].machines
    (old, machine), = machines.items()
    del machines[old]
    machine.id = "feedfeedfeed01"
    machines[machine.id] = machine
    await sweeps(world, 3)
    route = world.saved["routes"][ANN]
    assert (route["state"], route["machine_id"]) == ("ready", machine.id)
    await world.text("hello")
    await world.hears("ran: hello")


def test_a_missing_or_short_api_key_is_one_line_with_its_shape():
    environ = settings()
    del environ["COCKPIT_API_KEY"]
    assert len(problems(environ)) == 1
    assert "15 characters" in problems(settings(COCKPIT_API_KEY="fifteen-letters"))[0]


async def test_status_tells_how_long_a_vm_is_away_whoever_sets_the_clock(world):
    vm = await world.ready()
    vm.away = 503
    await world.text("hello")
    await world.hears(RESTARTING)
    world.clock.set_by = 7200
    await world.text("cockpit status")
    await world.clock.until(lambda: len(world.twilio.sent) == 2)
    assert world.twilio.sent_to(ANN)[1] == "Your VM has been away for 0 s. Nothing is running. 1 waiting."


# --- Page, metrics, logs ---

def parse_metrics(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Prometheus text, strictly: each metric's HELP, then TYPE, then all its samples and no other's; histograms cumulative."""
    found: dict[str, dict] = {}
    family, kind = "", ""
    for line in text.removesuffix("\n").split("\n"):
        if header := re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line):
            if header[1] == "HELP":
                assert header[2] not in found and header[2].startswith("cockpit_"), line
                family, kind = header[2], ""
                found[family] = {}
            else:
                assert (header[2], kind) == (family, "") and header[3] in ("counter", "gauge", "histogram"), line
                kind = header[3]
            continue
        sample = re.fullmatch(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\})? ([0-9.e+-]+)', line)
        assert sample and kind, line
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        assert sample[1] in [family + suffix for suffix in suffixes] and (kind != "counter" or family.endswith("_total")), line
        labels = tuple(re.findall(r'([a-z]+)="([^"]*)"', sample[2] or ""))
        assert not any(re.search(r"[0-9]{6}|cockpit-vm|SM[0-9a-f]{8}", value) for _, value in labels), line
        assert labels not in found.setdefault(sample[1], {}), line
        found[sample[1]][labels] = float(sample[3])
    for name, samples in found.items():
        if name.endswith("_bucket"):
            for labels, count in found[name.removesuffix("_bucket") + "_count"].items():
                row = [number for at, number in samples.items() if at[:-1] == labels]
                assert row == sorted(row) and row[-1] == count and samples[(*labels, ("le", "+Inf"))] == count, name
    return found


async def metrics(world: World, **more: Any) -> dict:
    return parse_metrics((await world.call("GET", "/metrics", **more)).text)


@pytest.fixture
def told():
    """The log lines of an event, as they are written: a function from event names to their fields."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(cockpit.LineFormatter(as_json=True))
    logger = logging.getLogger("cockpit")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda *events: [line for line in map(json.loads, stream.getvalue().splitlines()) if not events or line["event"] in events]
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_every_metric_has_help_and_type_and_the_numbers_add_up(world):
    vm = await world.ready()
    await world.text("one")
    await world.text("two")
    await world.hears("ran: one", "ran: two")
    await world.text("who?", EVE)
    vm.then({"status": 500})
    await world.text("three")
    await world.clock.until(lambda: len(world.twilio.sent_to(ANN)) == 3)
    world.twilio.fails("send", 400, code=21610)
    await world.text("four")
    await world.clock.until(lambda: world.twilio.count("send") == 4)
    await world.clock.settle()
    now = await metrics(world)
    texts, finished, sent = (now[f"cockpit_{name}_total"] for name in ("texts", "texts_finished", "messages_sent"))
    assert texts == {(("outcome", "accepted"),): 4, (("outcome", "unknown"),): 1}
    assert finished == {(("outcome", "answered"),): 3, (("outcome", "failed"),): 1} and now["cockpit_texts_waiting"] == {(): 0}
    assert sent == {(("outcome", "sent"),): 3, (("outcome", "failed"),): 1} and now["cockpit_twilio_errors_total"] == {(("code", "21610"),): 1}
    assert now["cockpit_text_handover_seconds_count"] == {(): 4} and now["cockpit_text_answer_seconds_count"] == {(): 2}
    assert now["cockpit_provision_seconds_count"] == {(("outcome", "ready"),): 1} and now["cockpit_vms"][(("state", "ready"),)] == 1
    upstream = now["cockpit_upstream_seconds_count"]
    assert upstream[(("service", "twilio"), ("operation", "create message"), ("status", "2xx"))] == 3
    assert now["cockpit_store_changes_total"][()] > 0 and now["cockpit_store_commit_seconds_count"][()] > 0


async def test_a_metric_with_too_many_labels_counts_the_rest_as_other():
    counts = cockpit.Counts("Things.", "code")
    for code in range(300):
        counts.add(f"x{code}")
    assert len(counts.values) == 201 and counts.values[("other",)] == 100
    counts.add('a"b\\\n')
    quoted = cockpit.Counts("Things.", "code")
    quoted.add('a"b\\\n')
    assert list(quoted.expose("x"))[2] == r'x_total{code="a\"b\\\n"} 1'


async def test_metrics_want_their_token_when_one_is_set(world):
    await world.start(METRICS_TOKEN="scrape-me")
    assert [(await world.call("GET", "/metrics", key=key)).status for key in (None, KEY, "scrape-me")] == [401, 401, 200]


async def test_every_answer_names_its_request_and_log_lines_carry_the_name(world, told):
    await world.start()
    answers = [await world.call(method, path) for method, path in (("GET", "/health"), ("GET", "/nowhere"), ("PUT", "/provision"), ("GET", "/"), ("GET", "/metrics"))]
    answers.append(await world.call("GET", "/provision", key="wrong"))
    answers.append(await world.twilio.posts("/sms", {"MessageSid": "SM1"}, "unsigned"))
    names = [answer.headers["X-Request-Id"] for answer in answers]
    assert len(set(names)) == len(names) and all(re.fullmatch("[0-9a-f]{16}", name) for name in names)
    assert [line["request_id"] for line in told("request_refused")] == names[-2:]
    fly = await world.call("GET", "/health", headers={"Fly-Request-Id": "01KB-iad-0123456789"})
    odd = await world.call("GET", "/health", headers={"Fly-Request-Id": "a b=c"})
    assert fly.headers["X-Request-Id"] == "01KB-iad-0123456789" and odd.headers["X-Request-Id"] != "a b=c"


async def test_a_text_is_followed_from_webhook_to_answer_by_its_sid(world):
    vm = await world.ready()
    gate = await world.occupies(vm, "the secret plan")
    sid, path = vm.asked[0].key, f"/messages/{vm.asked[0].key}"
    steps = [step["step"] for step in (await world.call("GET", path)).body["steps"]]
    assert steps == ["received", "stored", "handed_over"]
    await world.clock.advance(7)
    gate.open()
    await world.clock.until(lambda: world.twilio.sent_to(ANN))
    await world.clock.settle()
    answer = await world.call("GET", path)
    way = answer.body
    assert (way["message_sid"], way["vm_id"], way["outcome"], way["attempts"], way["errors"]) == (sid, vm.app, "answered", 1, [])
    assert [step["step"] for step in way["steps"]] == ["received", "stored", "handed_over", "answered", "sent"]
    assert 7000 <= way["steps"][-1]["ms"] < 8000 and way["steps"][0]["at"].endswith("Z")
    assert "secret plan" not in answer.text and ANN[-7:] not in answer.text
    assert (await world.call("GET", path, key=None)).status == 401 and (await world.call("GET", "/messages/SM404")).status == 404


async def test_a_text_s_way_tells_its_troubles_and_a_refused_one_why(world):
    vm = await world.ready()
    await world.leaves(vm, 503)
    await world.text("later", MessageSid="SM" + "1" * 32)
    await world.clock.advance(5)
    await world.returns(vm)
    await world.clock.until(lambda: len(world.twilio.sent_to(ANN)) == 2)
    way = (await world.call("GET", "/messages/SM" + "1" * 32)).body
    assert way["outcome"] == "answered" and way["attempts"] >= 2 and way["errors"][0]["error"] == "answered 503"
    await world.text("hi", EVE, MessageSid="SM" + "2" * 32)
    assert (await world.call("GET", "/messages/SM" + "2" * 32)).body["outcome"] == "unknown"


async def test_only_the_last_ten_thousand_ways_are_kept(world, monkeypatch):
    monkeypatch.setattr(cockpit, "TRACES_KEPT", 2)
    await world.start()
    for n in range(3):
        await world.text("hi", EVE, MessageSid=f"SM{n:032d}")
    assert [(await world.call("GET", f"/messages/SM{n:032d}")).status for n in range(3)] == [404, 200, 200]


async def test_a_retry_at_fly_says_whose_call_it_was(world, told):
    await world.start()
    world.fly.fails("set_secrets", 503)
    vm = await world.sign_up()
    line, = [line for line in told() if line["event"] == "retry"]
    assert line["path"] == f"/apps/{vm.app}/secrets"


async def test_a_text_with_which_all_is_well_is_one_log_line(world, told):
    vm = await world.ready()
    before = len(told())
    await world.text("hello")
    await world.clock.until(lambda: told("text_done"))
    for _ in range(3):
        await world.call("GET", "/health")
    line, = told()[before:]
    assert line["event"] == "text_done"
    assert line["vm_id"] == vm.app and line["phone"] == "+1555***4567" and line["message_sid"] == vm.asked[0].key and line["outcome"] == "answered" and len(line["request_id"]) == 16
    assert {"ms_to_hand_over", "ms_to_answer", "ms_to_sent"} <= line.keys()


@pytest.mark.parametrize("command", ["cockpit cancel", "cockpit lock"])
async def test_a_text_that_its_owner_dropped_has_its_log_line_too(world, told, command):
    vm = await world.ready()
    vm.away = 503
    await world.text("wait", MessageSid=(sid := "SM" + "1" * 32))
    await world.hears(RESTARTING)
    await world.text(command)
    await world.clock.until(lambda: any(line["event"] == "text_done" for line in told()))
    line, = [line for line in told() if line["event"] == "text_done"]
    assert line["message_sid"] == sid and line["outcome"] == "cancelled"
    assert (await world.call("GET", f"/messages/{sid}")).body["steps"][-1]["step"] == "sent"


async def test_log_lines_mask_whole_numbers_and_stay_one_line_in_both_formats():
    record = logging.LogRecord("cockpit", logging.INFO, "", 0, "100%s said", None, None)
    record.fields = {"words": f"from {ANN}\n\"x\"", "n": 1}
    for as_json in (True, False):
        text = cockpit.LineFormatter(as_json=as_json).format(record)
        assert "+1555***4567" in text
        assert "100%s said" in text
        assert ANN not in text
    line = json.loads(cockpit.LineFormatter(as_json=True).format(record))
    assert (line["words"], line["n"]) == ('from +1555***4567\n"x"', 1)


def test_a_group_of_numbers_is_json_in_a_line_of_text_too():
    record = logging.LogRecord("cockpit", logging.INFO, "", 0, "ready", None, None)
    record.fields = {"seconds": {"app": 0.1}}
    assert cockpit.LineFormatter(as_json=False).format(record).endswith("""seconds='{"app": 0.1}'""")


async def test_an_unforeseen_error_keeps_its_fields_and_its_trace(world, caplog):
    await world.start()
    world.server.runner.app[cockpit.GATEWAY].provisioner.begin = None  # a fault of ours
    assert (await world.provision()).body["code"] == "internal"
    record, = [record for record in caplog.records if record.getMessage() == "request_failed"]
    line = json.loads(cockpit.LineFormatter(as_json=True).format(record))
    assert (line["method"], line["call"]) == ("POST", "/provision")
    assert "TypeError" in line["trace"]


async def test_the_page_runs_by_itself_and_makes_no_markup_of_words(world):
    await world.start()
    answer = await world.call("GET", "/", key=None)
    policy, page = answer.headers["Content-Security-Policy"], answer.text
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1] for tag in ("style", "script"))
    for name, inline in (("style-src", style), ("script-src", script)):
        assert f"{name} 'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}';" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
    assert not re.findall(r"https?://[^'\" )]+", page) and page.count("<script") == page.count("<style") == 1
    assert not re.search(r"\s(?:on[a-z]+|style)=\"", page) and not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie", page)


async def test_the_table_tells_how_many_texts_of_each_vm_wait(world):
    vm, _ = await world.ready(), await world.sign_up(BOB)
    gate = await world.occupies(vm, "running")
    await world.text("waiting")
    rows = (await world.call("GET", "/events")).body["table"]["rows"]
    assert {row["vm_id"]: row["waiting"] for row in rows if row["waiting"]} == {vm.app: 2}
    gate.open()


async def test_the_live_feed_needs_the_key_and_shows_masked_numbers(world):
    vm = await world.ready()
    assert (await world.call("GET", "/events", key=None)).status == 401
    once = await world.call("GET", "/events")
    row, = once.body["table"]["rows"]
    assert (row["vm_id"], row["phone"], row["state"], row["waiting"]) == (vm.app, "+1555***4567", "ready", 0) and ANN not in once.text and GITHUB not in once.text
    async with world.session.get(world.twilio.gateway + "/events", headers={"Authorization": f"Bearer {KEY}", "Accept": "text/event-stream"}) as stream:
        assert stream.content_type == "text/event-stream" and stream.headers["X-Request-Id"]
        assert b'"vms"' in await world.clock.run(stream.content.readuntil(b"\n\n"))
        assert b"event: table" in await world.clock.run(stream.content.readuntil(b"\n\n"))
        await world.leaves(vm, 503)
        await world.text("are you there?")
        seen = b""
        while b'"state": "away"' not in seen:
            seen = await world.clock.run(stream.content.readuntil(b"\n\n"))
        assert ANN.encode() not in seen


class Tab:
    """A tab of a real browser, driven over the DevTools protocol by what a person has: keys, taps and eyes."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.session, self.sent, self.faults = socket, "", 0, []

    async def ask(self, method: str, **params: Any) -> dict:
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {}))
        async with asyncio.timeout(20):
            while True:
                told = await self.socket.receive_json()
                if told.get("id") == self.sent:
                    assert "error" not in told, told
                    return told["result"]
                entry = told.get("params", {}).get("entry", {})
                if told.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error" and entry["source"] != "network":
                    self.faults.append(told["params"])

    async def open(self) -> None:
        context = await self.ask("Target.createBrowserContext", disposeOnDetach=True)
        target = await self.ask("Target.createTarget", url="about:blank", **context)
        self.session = (await self.ask("Target.attachToTarget", flatten=True, **target))["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")
        await self.ask("Emulation.setFocusEmulationEnabled", enabled=True)

    async def show(self, url: str, width: int = 1440, before: str = "") -> None:
        await self.looks(width)
        await self.ask("Page.addScriptToEvaluateOnNewDocument", source=before)
        await self.ask("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && document.activeElement.id === 'key'")

    async def looks(self, width: int, scheme: str = "light") -> None:
        await self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        await self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def js(self, expression: str) -> Any:
        told = await self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, (expression, told)
        return told["result"].get("value")

    async def until(self, expression: str) -> None:
        deadline = time.monotonic() + 15
        while not await self.js(f"!!({expression})"):
            assert time.monotonic() < deadline, (expression, await self.js("document.body.innerText"))
            await asyncio.sleep(0.02)

    async def types(self, text: str) -> None:
        await self.ask("Input.insertText", text=text)

    async def presses(self, *keys: str) -> None:
        for key in keys:
            code, text = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " "), "Escape": (27, "")}[key]
            for kind in ("keyDown", "keyUp"):
                await self.ask("Input.dispatchKeyEvent", type=kind, key=text if key == "Space" else key, code=key, windowsVirtualKeyCode=code, text=text)

    async def walks_to(self, test: str) -> None:
        """Tab by Tab, to what a person who only has keys can reach."""
        for _ in range(60):
            if await self.js(f"(n => {test})(document.activeElement)"):
                return
            await self.presses("Tab")
        raise AssertionError(f"no way by keyboard to {test}")

    async def chooses(self, words: str) -> None:
        await self.walks_to(f"['BUTTON', 'SUMMARY'].includes(n.tagName) && n.textContent === {json.dumps(words)}")
        await self.presses("Enter")

    async def fills(self, **fields: str) -> None:
        for name, text in fields.items():
            await self.walks_to(f"n.name === '{name}'")
            await self.js("document.activeElement.select()")
            await self.types(text)

    async def has_focus(self) -> str:
        return await self.js("(n => n.id || n.name || n.textContent || n.tagName)(document.activeElement)")

    async def signs_in(self, key: str = KEY) -> None:
        await self.types(key)
        await self.presses("Enter")
        await self.until("document.body.className === 'in' && (document.querySelector('#rows').children.length || document.querySelector('#none').textContent)")


@pytest.fixture(scope="session")
def chromium(side):
    """One browser for all; where it listens to DevTools."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("the page is tested where Chromium is installed")
    switches = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync "
                "--disable-dev-shm-usage --remote-debugging-port=0").split()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = subprocess.Popen([path, *switches, f"--user-data-dir={folder}"], stderr=subprocess.PIPE, env=os.environ | {"HOME": folder}, start_new_session=True)
        found = None
        while found is None and (line := browser.stderr.readline()):
            found = re.search(rb"DevTools listening on (ws://\S+)", line)
        try:
            yield found[1].decode() if found else pytest.skip("Chromium does not start here")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait(10)
            browser.stderr.close()


@pytest.fixture
async def tab(chromium, live, monkeypatch):
    """A tab, beside the surroundings of a gateway in real time whose feed is quick; at its end nothing was thrown in it or refused by the policy."""
    monkeypatch.setattr(cockpit, "FEED_EVERY_S", 0.1)
    async with live.session.ws_connect(chromium, max_msg_size=0) as socket:
        tab = Tab(socket)
        await tab.open()
        yield tab
        await tab.js("1")
        assert not tab.faults


# Of everything that is shown: what cannot be told from its ground (WCAG 1.4.3), what is too small to tap, what another thing lies on, what runs out at the side.
EYES = r"""(() => {
  const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const mix = colours => { pen.clearRect(0, 0, 1, 1); for (const c of colours) { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); } return [...pen.getImageData(0, 0, 1, 1).data]; };
  const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const faults = [], top = [...document.querySelectorAll('dialog[open]')].pop() || document.body;
  for (const node of top.querySelectorAll('*')) {
    const own = [...node.childNodes].some(kid => kid.nodeType === 3 && kid.data.trim()) || node.matches('input');
    const box = node.getBoundingClientRect();
    if (!node.checkVisibility({opacityProperty: true}) || !box.width) continue;
    const name = `${node.tagName} ${node.id || node.className || node.name} "${node.textContent.slice(0, 30)}"`;
    if (own) {
      const grounds = []; for (let n = node; n; n = n.parentElement) grounds.unshift(getComputedStyle(n).backgroundColor);
      const ground = ['Canvas', ...grounds], ink = getComputedStyle(node).color;
      const [a, b] = [light(mix([...ground, ink])), light(mix(ground))].sort((x, y) => y - x);
      if ((a + 0.05) / (b + 0.05) < 4.5) faults.push(`contrast ${((a + 0.05) / (b + 0.05)).toFixed(2)}: ${name}`);
      if (node.scrollWidth > node.clientWidth + 1 && node.clientWidth && !node.matches('input')) faults.push(`cut off: ${name}`);
    }
    if (node.matches('button,input:not([type=checkbox]),select,summary,label.row')) {
      if ((node.matches('.who') ? node.closest('li').getBoundingClientRect() : box).height < 40) faults.push(`${box.height} px to tap: ${name}`);
      const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      if (hit && !node.contains(hit) && !hit.contains(node) && !hit.closest('header')) faults.push(`covered by ${hit.tagName}.${hit.className}: ${name}`);
    }
  }
  if (document.documentElement.scrollWidth > document.documentElement.clientWidth) faults.push('the page runs out at the side');
  return faults;
})()"""


async def test_a_trouble_of_300_characters_is_read_whole_at_every_width_in_light_and_dark(live, tab):
    vm = await live.ready()
    words = f"exit_code=137, oom_killed=true, {'requested_stop=false, ' * 10}image registry.fly.io/sms-cockpit-vm:{'deployment01' * 5}"
    live.fly.fails("restart_machine", 422, body={"error": words})
    assert (await live.call("POST", f"/provision/{vm.app}/restart")).status == 502
    trouble = (await live.call("GET", f"/provision/{vm.app}")).body["last_error"]
    assert words in trouble and len(trouble) > 300
    await tab.show(live.twilio.gateway)
    await tab.signs_in()
    shown = "document.querySelector('#rows li p')"
    await tab.until(f"{shown}?.textContent")
    for width, scheme in itertools.product((1440, 768, 390), ("light", "dark")):
        await tab.looks(width, scheme)
        assert await tab.js(f"{shown}.innerText.toLowerCase().includes({json.dumps(trouble.lower())}) && {shown}.innerText.endsWith('Try it again.')"), (width, scheme)
        assert await tab.js(EYES) == [], (width, scheme)
        await tab.js("document.querySelector('.who').click()")
        await tab.until("document.querySelector('#details').open && document.querySelector('#trouble').innerText")
        assert trouble.lower() in (await tab.js("document.querySelector('#trouble').innerText")).lower()
        assert await tab.js(EYES) == [], ("details", width, scheme)
        await tab.js("document.querySelector('#details').close()")


async def test_what_the_pointer_rests_on_can_be_read(live, tab):
    await live.start()
    await tab.show(live.twilio.gateway)
    await tab.signs_in()
    for scheme in ("light", "dark"):
        await tab.looks(1440, scheme)
        x, y = await tab.js("(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector('#new').getBoundingClientRect())")
        await tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        await tab.until("document.querySelector('#new').matches(':hover')")
        assert await tab.js(EYES) == [], scheme


async def test_the_code_of_a_vm_that_is_gone_is_no_longer_shown(live, tab, monkeypatch):
    monkeypatch.setattr(cockpit, "FEED_EVERY_S", 60)
    vm = await live.ready()
    await live.call("POST", f"/provision/{vm.app}/lock")
    await tab.show(live.twilio.gateway)
    await tab.signs_in()
    await tab.js("document.querySelector('.who').click()")
    await tab.until("document.querySelector('#pairing b')")
    assert (await live.call("DELETE", f"/provision/{vm.app}")).status == 204
    await tab.js("document.querySelector('#changes details:last-child button').click()")
    await tab.until("document.querySelector('#trouble').textContent.startsWith('There is no VM')")
    assert await tab.js("document.querySelector('#pairing').textContent") == ""


async def test_everything_on_the_page_works_by_keyboard_and_the_focus_is_never_lost(live, tab):
    await live.start()
    await tab.show(live.twilio.gateway)
    await tab.types("no such key")
    await tab.presses("Enter")
    await tab.until("document.querySelector('#why').textContent.includes('not accepted')")
    assert await tab.js("document.activeElement.id + document.activeElement.ariaInvalid") == "keytrue"
    await tab.signs_in()
    assert await tab.has_focus() == "new"
    await tab.presses("Enter")
    await tab.fills(phone_number=ANN, github_token=GITHUB, value=ANTHROPIC)
    await tab.chooses("Set up")
    await tab.until("document.querySelector('#who').textContent === '+1555***4567: ready'")
    assert await tab.has_focus() == "who"
    vm, = (await live.call("GET", "/provision")).body["vms"]
    for change, end in (("Restart", "done."), ("Upgrade", "done.")):
        await tab.chooses(change)
        await tab.presses("Tab", "Enter")
        await tab.until(f"document.querySelector('#news').textContent === '{change}, +1555***4567: {end}'")
        assert await tab.has_focus() == change
    assert live.fly.count("restart_machine") == 1
    await tab.chooses("Lock")
    await tab.presses("Tab", "Enter")
    await tab.until("document.querySelector('#news').textContent === 'Lock, +1555***4567: done.' && document.querySelector('#pairing b')")
    code = (await live.call("GET", f"/provision/{vm['vm_id']}")).body["pairing_code"]
    assert await tab.js("document.querySelector('#pairing b').textContent") == code and await tab.has_focus() == "Lock"
    await tab.chooses("Change credentials")
    await tab.fills(github_token="ghp_renewed")
    await tab.presses("Enter")
    await tab.until("document.querySelector('#news').textContent === 'Change of credentials, +1555***4567: done.'")
    assert live.fly.apps[vm["vm_id"]].secrets["GITHUB_TOKEN"] == "ghp_renewed" and await tab.has_focus() == "github_token"
    await tab.presses("Escape")
    await tab.until("document.activeElement.textContent === '+1555***4567'")
    await tab.presses("Enter")
    await tab.until("document.querySelector('#details').open")
    await tab.chooses("Tear down")
    await tab.presses("Tab", "Enter")
    await tab.until("document.querySelector('#news').textContent === 'Tear down, +1555***4567: done.' && !document.querySelector('#rows').children.length")
    assert await tab.has_focus() == "Tear down" and vm["vm_id"] not in live.fly.apps
    await tab.presses("Escape")
    await tab.until("document.activeElement.id === 'new'")
    await tab.chooses("Sign out")
    assert await tab.has_focus() == "key" and await tab.js("sessionStorage.length") == 0


async def test_a_set_up_that_fails_says_in_its_details_at_which_step_and_what_helps(live, tab):
    await live.start()
    live.fly.fails("create_machine", 422, body={"error": "insufficient memory"}, times=9)
    await tab.show(live.twilio.gateway)
    await tab.signs_in()
    await tab.presses("Enter")
    await tab.fills(phone_number=ANN, github_token=GITHUB, value=ANTHROPIC)
    await tab.presses("Enter")
    await tab.until("document.querySelector('#who').textContent.includes('failed: machine')")
    shown = await tab.js("document.querySelector('#details').innerText")
    assert "✓ address" in shown.replace("\u00a0", " ") and "✗ machine" in shown.replace("\u00a0", " ") and "○ health" in shown.replace("\u00a0", " ")
    assert "insufficient memory" in shown and "Choose another region" in shown


async def test_a_form_says_at_each_field_what_is_wrong_with_it(live, tab):
    await live.start()
    await tab.show(live.twilio.gateway)
    await tab.signs_in()
    await tab.presses("Enter")
    await tab.fills(phone_number="12", github_token=GITHUB, variable="lower case", value="x")
    await tab.presses("Enter")
    await tab.until("document.querySelector('#order-words').textContent === 'Correct what is marked.'")
    marked = await tab.js("[...document.querySelectorAll('#order [aria-invalid=true]')].map(n => [n.name, document.getElementById(n.getAttribute('aria-describedby')).textContent])")
    assert [name for name, _ in marked] == ["phone_number", "variable"]
    assert marked[0][1].startswith("Must be a phone number in E.164 form") and marked[1][1].startswith("Must be named like an environment variable")
    assert await tab.has_focus() == "phone_number"
    for width, scheme in ((1440, "dark"), (390, "light")):
        await tab.looks(width, scheme)
        assert await tab.js(EYES) == []
    await tab.fills(phone_number=ANN, variable="AN_API_KEY")
    await tab.presses("Enter")
    await tab.until("document.querySelector('#details').open")
    assert await tab.js("document.querySelectorAll('#order [aria-invalid], .fault').length") == 0
    await tab.until("document.querySelector('#who').textContent.endsWith(': ready')")


# What a gateway that pairs and sleeps adds to a record.
PAIRING = """const ask = window.fetch;
let paired = false;
window.fetch = async (path, options) => {
  const answer = await ask(path, options);
  if (!/^provision\\/cockpit/.test(path) || !answer.ok || options?.method) return answer;
  return Response.json({...await answer.json(), state: paired ? 'asleep' : 'ready', paired, awake_s: 45000, ...(paired ? {} : {pairing_code: '482913'})});
};"""


async def test_the_details_of_a_vm_show_its_pairing_code_its_hours_and_its_texts_without_words_or_numbers(live, tab):
    vm = await live.ready()
    await live.text("the secret plan")
    await live.hears("ran: the secret plan")
    await tab.show(live.twilio.gateway, before=PAIRING)
    await tab.signs_in()
    await tab.walks_to("n.className === 'who'")
    await tab.presses("Enter")
    await tab.until("document.querySelector('#texts li')")
    shown = await tab.js("document.querySelector('#details').innerText")
    assert "+1555***4567: not paired" in shown and "482913" in shown and "Text this code from that phone" in shown
    assert "12.5 h in all" in shown and vm.app in shown and "✓ health" in shown.replace("\u00a0", " ")
    assert vm.asked[0].key in shown and re.search(r"answered after [0-9.]+ s, sent after [0-9.]+ s", shown)
    assert "secret plan" not in shown and ANN[-7:] not in await tab.js("document.documentElement.outerHTML")
    assert await tab.js("parseFloat(getComputedStyle(document.querySelector('#pairing b')).fontSize)") >= 36
    assert await tab.js(EYES) == []
    await tab.js("paired = true")
    await tab.until("document.querySelector('#who').textContent === '+1555***4567: asleep' && !document.querySelector('#pairing b')")


async def test_the_last_twenty_texts_of_a_vm_are_in_its_record_the_youngest_first(world):
    vm = await world.ready(TEXT_LIMIT=0)
    await world.sign_up(BOB)
    for n in range(22):
        await world.text(f"my plan {n}")
        await world.text("other", BOB)
        await world.clock.until(lambda: len(world.twilio.sent_to(ANN)) == n + 1)
    sids = [asked.key for asked in reversed(vm.asked)]
    answer = await world.call("GET", f"/provision/{vm.app}")
    assert [text["message_sid"] for text in answer.body["texts"]] == sids[:20]
    assert answer.body["texts"][0] == (await world.call("GET", f"/messages/{sids[0]}")).body and "my plan" not in answer.text


async def test_on_a_small_screen_the_phone_is_one_tap_away_and_says_what_goes_wrong_at_its_field(live, tab):
    await a_laptop(live)
    assert (await live.ask("POST", "/provision", key="local", json=sign_up_form())).status == 201
    await tab.show(live.twilio.gateway, 390)
    await tab.signs_in("local")
    x, y = await tab.js("(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector('#to-phone').getBoundingClientRect())")
    for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
        await tab.ask("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    await tab.until("document.activeElement.id === 'words'")
    assert await tab.js("(b => b.top >= 0 && b.bottom <= innerHeight)(document.activeElement.getBoundingClientRect())")
    await tab.until(f"document.querySelector('#from').value === '{ANN}'")
    await tab.types("hello from a phone")
    await tab.presses("Enter")
    await tab.until("document.querySelector('#thread').innerText.split('hello from a phone').length === 3")
    assert await tab.has_focus() == "words" and await tab.js(EYES) == []
    await tab.js("document.querySelector('#from').value = '555'")
    await tab.types("to nobody")
    await tab.presses("Enter")
    await tab.until("document.querySelector('#from').ariaInvalid === 'true'")
    assert await tab.has_focus() == "from" and await tab.js("document.querySelector('#words').value") == "to nobody"
    assert await tab.js(EYES) == []


# --- Local world ---

async def a_laptop(live: World, **environ: str) -> Child:
    """`python cockpit.py` with nothing set but its port."""
    return await live.adopt(await Child.start(environ, free_port(), live.disks))


def vm_processes(child: Child) -> list[int]:
    pid = child.process.pid
    return [int(vm) for vm in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def has_ended(process: int | str) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return not Path(f"/proc/{process}/cmdline").read_text()
    return True


async def thread(live: World, phone: str = ANN) -> str:
    return (await live.ask("GET", f"/_local/texts?phone=%2B{phone[1:]}", key="local")).text


async def reads(live: World, *words: str) -> None:
    """The local phone's thread comes to hold these words."""
    deadline, shown = time.monotonic() + 12, ""
    while not all(word in shown for word in words):
        assert time.monotonic() < deadline, f"{words} not in {shown}"
        shown = await thread(live)
        await asyncio.sleep(0.03)


async def texts_locally(live: World, body: str) -> None:
    answer = await live.ask("POST", "/_local/texts", key="local", json={"from": ANN, "body": body})
    assert answer.status in (200, 201, 202), answer.text


async def echoes(live: World, words: str) -> None:
    """The text and its echo stand in the thread."""
    deadline = time.monotonic() + 10
    while (await thread(live)).count(words) < 2:
        assert time.monotonic() < deadline, await thread(live)
        await asyncio.sleep(0.03)


@beside
async def test_the_whole_world_runs_on_a_laptop(live):
    routes = live.disks / "routes.json"
    routes.write_text('{"version": 1, "routes": {}}\n')
    child = await a_laptop(live, TWILIO_SECRET_OF_SOMEBODY_ELSE="gateway-only")
    answer = await live.ask("POST", "/provision", key="local", json=sign_up_form())
    assert answer.status == 201, answer.text
    vm, = vm_processes(child)
    environ = dict(line.split("=", 1) for line in Path(f"/proc/{vm}/environ").read_text().split("\0") if line)
    assert (environ["GITHUB_TOKEN"], environ["ANTHROPIC_API_KEY"]) == (GITHUB, ANTHROPIC) and environ["COCKPIT_TOKEN"].startswith(answer.body["vm_id"] + ".")
    assert "gateway-only" not in environ.values() and not {"COCKPIT_SECRET", "COCKPIT_API_KEY", "FLY_API_TOKEN"} & set(environ)
    await texts_locally(live, "hello from a phone")
    await reads(live, "hello from a phone")
    os.kill(vm, signal.SIGKILL)
    await texts_locally(live, "after the kill")
    await reads(live, RESTARTING)
    await live.clock.until(lambda: vm_processes(child) not in ([], [vm]))
    await echoes(live, "after the kill")
    vm, = vm_processes(child)
    assert await child.ends(signal.SIGTERM) == 0
    assert not Path(f"/proc/{vm}").exists() and routes.read_text() == '{"version": 1, "routes": {}}\n'
    assert child.url in child.log and "local" in child.log, "it says where the page is and which key to use"


@beside
async def test_a_local_vm_that_sleeps_is_stopped_and_goes_on_where_it_was(live):
    child = await a_laptop(live, VM_IDLE_S="0.5", RECONCILE_S="0")
    vm_id = (await live.ask("POST", "/provision", key="local", json=sign_up_form())).body["vm_id"]
    vm, = vm_processes(child)
    await live.clock.until(lambda: process_state(vm) == "T", within=20, real=20)
    await texts_locally(live, "good morning")
    await echoes(live, "good morning")
    assert vm_processes(child) == [vm], "its memory survived"
    assert RESTARTING not in await thread(live)
    await live.clock.until(lambda: process_state(vm) == "T", within=20, real=20)
    assert (await live.ask("GET", f"/provision/{vm_id}", key="local")).body["state"] == "asleep"
    await child.ends(signal.SIGKILL)
    await live.clock.until(lambda: process_state(vm) in ("", "Z"), within=10, real=10)
    again = await a_laptop(live, VM_IDLE_S="100", RECONCILE_S="0")
    await texts_locally(live, "after the kill")
    await echoes(live, "after the kill")
    assert vm_processes(again)


def process_state(pid: int) -> str:
    """T: stopped; nothing: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_what_a_killed_gateway_left_stopped_is_ended_by_pid_and_start_time():
    sleeper, stranger = (subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2))
    try:
        members = cockpit.signal_session(sleeper.pid, signal.SIGSTOP)
        assert [pid for pid, _ in members] == [sleeper.pid]
        cockpit.end_stopped([*members, (stranger.pid, "1"), (2**22 + 1, "1")])
        assert sleeper.wait(5) == -signal.SIGKILL
        assert stranger.poll() is None, "another process has its number now"
    finally:
        for process in (sleeper, stranger):
            process.kill()
            process.wait()


@beside
async def test_the_built_in_agent_crashes_and_a_command_of_one_s_own_replaces_it(live):
    child = await a_laptop(live)
    vm_id = (await live.ask("POST", "/provision", key="local", json=sign_up_form())).body["vm_id"]
    await texts_locally(live, "crash")
    await reads(live, RESTARTING)
    assert (await live.ask("DELETE", f"/provision/{vm_id}", key="local")).status == 204
    assert not vm_processes(child) and await child.ends(signal.SIGINT) == 0
    await a_laptop(live, LOCAL_AGENT="tr a-z A-Z")
    await live.ask("POST", "/provision", key="local", json=sign_up_form())
    await texts_locally(live, "shout it")
    await reads(live, "SHOUT IT")


@beside
async def test_what_an_agent_started_ends_with_its_vm(live):
    child = await a_laptop(live, LOCAL_AGENT=f"sh -c 'echo $$ >> {live.disks}/agents; sleep 600'")
    await live.ask("POST", "/provision", key="local", json=sign_up_form())
    await texts_locally(live, "work")
    agents = live.disks / "agents"
    await live.clock.until(lambda: agents.exists() and agents.read_text().endswith("\n"))
    os.kill(vm_processes(child)[0], signal.SIGKILL)
    agent = agents.read_text().split()[0]
    await live.clock.until(lambda: has_ended(agent))


@beside
async def test_the_local_world_outlives_a_kill_of_the_gateway(live):
    child = await a_laptop(live)
    vm_id = (await live.ask("POST", "/provision", key="local", json=sign_up_form())).body["vm_id"]
    await texts_locally(live, "before the kill")
    await reads(live, "before the kill")
    vm, = vm_processes(child)
    await texts_locally(live, "sleep 2")
    await child.ends(signal.SIGKILL)
    await live.clock.until(lambda: has_ended(vm))
    child = await a_laptop(live)
    await reads(live, "before the kill", "Slept 2 s.")
    assert (await live.ask("GET", f"/provision/{vm_id}", key="local")).body["phone_number"] == ANN
    await texts_locally(live, "after the kill")
    await reads(live, "after the kill")
    world = live.disks / ".cockpit"
    assert stat.S_IMODE(world.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in world.iterdir() if file.is_file()} == {0o600}
    assert (world / "vms" / vm_id).is_dir()


@beside
async def test_a_local_vm_that_there_is_not_is_not_said_to_be_killed(live):
    await a_laptop(live)
    answer = await live.ask("POST", "/_local/vms/nosuch/kill", key="local", json={})
    assert (answer.status, answer.body["code"]) == (404, "unknown_vm")


@beside
async def test_the_end_of_a_local_vm_is_not_logged_as_the_work_of_the_request_that_made_it(live):
    child = await a_laptop(live)
    vm_id = (await live.ask("POST", "/provision", key="local", json=sign_up_form())).body["vm_id"]
    await live.ask("POST", f"/_local/vms/{vm_id}/kill", key="local", json={})
    await live.clock.until(lambda: "local_vm_exited" in child.log)
    assert "request_id" not in next(line for line in child.log.splitlines() if "local_vm_exited" in line)


@beside
async def test_the_local_phone_says_what_twilio_would_or_why_nothing(live):
    await a_laptop(live)
    await texts_locally(live, "hello?")
    await reads(live, "this number has no VM")
    await live.ask("POST", "/provision", key="local", json=sign_up_form())
    await texts_locally(live, "stop")
    await reads(live, "Twilio itself answers STOP", '"direction": "note"')


@beside
async def test_local_doors_stay_shut_for_what_comes_through_a_tunnel(live):
    await a_laptop(live)
    paths = [("POST", "/_local/texts"), ("GET", f"/_local/texts?phone=%2B{EVE[1:]}"), ("GET", "/_local/vm/x/health")]
    for headers in ({"Host": "evil.example.com"}, {"Host": "[::1"}, {"X-Forwarded-For": "203.0.113.9"}, {"X-Forwarded-Host": "localhost"},
                    {"Forwarded": "for=203.0.113.9"}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        for method, path in paths if "Content-Type" not in headers else paths[:1]:
            sent = {"Content-Type": "application/json"} | headers
            answer = await live.ask(method, path, key="local", data=json.dumps({"from": EVE, "body": "hi"}), headers=sent)
            assert answer.status in (403, 415), (headers, answer.text)
    for path in ("/provision", "/health", "/"):  # a page elsewhere may point its own name at this machine
        assert (await live.ask("GET", path, key="local", headers={"Host": "evil.example.com"})).status == 403
    assert (await live.ask("POST", "/_local/texts", key=None, json={"from": EVE, "body": "hi"})).status == 401
    assert (await live.ask("GET", f"/_local/texts?phone=%2B{EVE[1:]}", key=None)).status == 401
    assert "hi" not in await thread(live, EVE)


async def test_production_knows_nothing_of_local_mode(world):
    await world.start()
    for method, path in (("POST", "/_local/texts"), ("GET", "/_local/texts?phone=x"), ("GET", "/_local/vm/x/health"), ("GET", "/_local/v1/apps")):
        answer = await world.call(method, path, json={"from": ANN, "body": "hi"})
        assert (answer.status, answer.body["code"]) == (404, "not_found")


@beside
async def test_the_vm_command_serves_the_vm_s_half_of_the_contract(live):
    ran = live.disks / "ran"
    environ = {"COCKPIT_TOKEN": "vm-x.token", "LOCAL_AGENT": f"sh -c 'cat >> {ran}; echo done; test -e {live.disks}/go || head -n1 {live.disks}/fifo'"}
    os.mkfifo(live.disks / "fifo")
    (live.disks / "go").touch()

    async def start() -> Child:
        port = free_port()
        return await live.adopt(await Child.start(environ, port, live.disks, "vm", "--port", str(port)))

    async def command(text: str, key: str, token: str = "vm-x.token") -> Answer:
        return await live.ask("POST", "/command", key=token, json={"text": text, "media": []}, headers={"Idempotency-Key": key})

    child = await start()
    health = await live.ask("GET", "/health", key=None)
    assert (health.status, health.body["status"]) == (200, "ok")
    assert (await command("no", "K0", "wrong")).status == 401 and (await command("no", "K0", "")).status == 401
    first = await command("one\n", "K1")
    assert first.status == 200 and first.body["text"].strip() == "done" and {"images", "exitCode", "durationMs"} <= set(first.body)
    await child.ends(signal.SIGKILL)
    await start()
    assert (await command("one\n", "K1")).body == first.body and ran.read_text() == "one\n", "the stored answer survives, the command is not run again"
    (live.disks / "go").unlink()
    slow = asyncio.ensure_future(command("two\n", "K2"))
    await live.clock.until(lambda: "two" in ran.read_text())
    assert (await command("three\n", "K3")).status == 409 and (await command("two\n", "K2")).status == 409
    os.write(os.open(live.disks / "fifo", os.O_RDWR | os.O_NONBLOCK), b"go\n")
    assert (await slow).status == 200 and ran.read_text() == "one\ntwo\n"
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "none.png"):
        assert (await live.ask("GET", f"/images/{name}", key="vm-x.token")).status in (400, 404)


@pytest.mark.parametrize("answers", ["{", "5", '[["x"]]'])
@beside
async def test_the_vm_command_starts_whatever_its_stored_answers_look_like(live, answers):
    (live.disks / ".cockpit-vm-answers.json").write_text(answers)
    port, agent = free_port(), live.disks / "agent"
    child = await live.adopt(await Child.start({"LOCAL_AGENT": f"sh -c 'echo $$ > {agent}; exec sleep 600'"}, port, live.disks, "vm", "--port", str(port)))
    command = asyncio.ensure_future(live.ask("POST", "/command", json={"text": "work", "media": []}))
    await live.clock.until(lambda: agent.exists() and agent.read_text().endswith("\n"))
    await child.ends(signal.SIGTERM)
    await asyncio.gather(command, return_exceptions=True)
    await live.clock.until(lambda: not Path(f"/proc/{agent.read_text().strip()}").exists())


# Agents

PRESETS = {  # how a preset's program is called: resuming, and for a new conversation
    "claude": ("-p --continue --dangerously-skip-permissions", "-p --dangerously-skip-permissions"),
    "codex": ("exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox resume --last -",
              "exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox -"),
    "gemini": ("--resume latest --approval-mode yolo --skip-trust", "--approval-mode yolo --skip-trust"),
    "opencode": ("run --continue --auto", "run --auto")}
STAND_IN = """#!/bin/sh
said=$(cat)
printf '%s\\n' "$*" "$PWD" "$WORKSPACE" "$ANTHROPIC_API_KEY" "$IS_SANDBOX" "$said" > "$0.called"
echo "did $said"
echo "complaint" >&2
case "$said" in
picture*) printf '\\211PNG\\r\\n\\032\\n1234' > images/plot.png; printf 'GIF89a12' > images/old.gif; echo 'GIF? no' > images/no.gif
    printf 'GIF89a12' > outside.gif; ln -s ../outside.gif images/link.gif ;;
fail*) exit 3 ;;
leave*) sleep 600 & ;;
hang*) trap '' INT; sh -c 'trap "" INT; echo $$ > child; sleep 600' & wait ;;
esac
"""


def a_program(folder: Path, name: str, script: str = STAND_IN) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(script)
    program.chmod(0o755)
    return program


class AgentVM:
    """A VM in a folder of its own, beside stand-ins of agents: `python cockpit.py vm`, or its server in this process."""

    def __init__(self, live: World):
        self.live, self.folder = live, live.disks / "work"
        self.folder.mkdir()
        self.child: Child | None = None

    async def start(self, agent: str, **environ: str) -> None:
        port, path = free_port(), f"{self.live.disks / 'bin'}:{os.environ['PATH']}"
        environ = {"PATH": path, "COCKPIT_TOKEN": "vm-x.token", "WORKSPACE": str(self.folder), "ANTHROPIC_API_KEY": "of-the-vm"} | environ
        self.child = await self.live.adopt(await Child.start(environ, port, self.live.disks, "vm", "--port", str(port), "--agent", agent))

    @contextlib.asynccontextmanager
    async def serves(self, agent: str, monkeypatch):
        for name, value in (("PATH", f"{self.live.disks / 'bin'}:{os.environ['PATH']}"), ("ANTHROPIC_API_KEY", "of-the-vm"), ("WORKSPACE", ""), ("IS_SANDBOX", "")):
            monkeypatch.setenv(name, value)
        cockpit.prepare_environment(agent, self.folder)
        server = Server(cockpit.VmServer("vm-x.token", agent, self.folder).app())
        await server.start()
        self.live.twilio.gateway = server.url
        try:
            yield
        finally:
            await server.close()

    async def ask(self, method: str, path: str, **more: Any) -> Answer:
        return await self.live.ask(method, path, key="vm-x.token", **more)

    async def command(self, text: str, media: Any = (), key: str = "", **more: Any) -> dict[str, Any]:
        answer = await self.ask("POST", "/command", json={"text": text, "media": list(media)} | more, headers={"Idempotency-Key": key})
        assert answer.status == 200, answer.text
        return answer.body

    async def health(self) -> dict[str, Any]:
        return (await self.ask("GET", "/health")).body


@pytest.mark.parametrize("agent", PRESETS)
async def test_a_preset_is_called_so_that_it_resumes_unless_a_new_conversation_is_asked_for(live, monkeypatch, agent):
    program, vm = a_program(live.disks / "bin", agent), AgentVM(live)
    resuming, fresh = PRESETS[agent]

    def called() -> list[str]:
        return Path(f"{program}.called").read_text().splitlines()
    sandbox = "1" if agent == "claude" and os.geteuid() == 0 else ""
    async with vm.serves(agent, monkeypatch):
        for text in ("first", "second"):
            assert (await vm.command(text))["text"].strip() == f"did {text}", "the complaint is not shown"
            assert called() == [resuming, str(vm.folder), str(vm.folder), "of-the-vm", sandbox, text]
        answer = await vm.command("fail now", new=True)
        assert called()[0] == fresh
        assert (answer["text"], answer["exitCode"], answer["images"]) == ("did fail now\ncomplaint", 3, [])
        assert {"type": "image/png", "url": "/images/plot.png"} in (await vm.command("picture, please"))["images"]


async def test_only_pictures_that_appear_are_shown_and_none_that_a_link_leads_to(live, monkeypatch):
    a_program(live.disks / "bin", "claude")
    vm = AgentVM(live)
    images, elsewhere = vm.folder / "images", live.disks / "elsewhere"
    for folder in (images, elsewhere):
        folder.mkdir()
        (folder / "before.png").write_bytes(PNG)
    async with vm.serves("claude", monkeypatch):
        shown = (await vm.command("picture"))["images"]
        assert sorted(image["url"] for image in shown) == ["/images/old.gif", "/images/plot.png"]
        for name, status in (("plot.png", 200), ("link.gif", 404), ("..%2foutside.gif", 404)):
            url = URL(f"{live.twilio.gateway}/images/{name}", encoded=True)
            async with live.session.get(url, headers={"Authorization": "Bearer vm-x.token"}) as response:
                assert response.status == status, name
        assert (await vm.command("more words"))["images"] == []
        for n in range(12):
            (elsewhere / f"{n}.gif").write_bytes(GIF)
        (elsewhere / "large.png").write_bytes(PNG + bytes(5 << 20))
        many = cockpit.shown_since(elsewhere, set())
        assert len(many) == 10 and "large" not in str(many)
        shutil.rmtree(images)
        images.symlink_to(elsewhere)
        assert (await vm.command("hello"))["images"] == []


def test_a_pipe_among_the_pictures_holds_up_no_command(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "plot.png").write_bytes(PNG)
    assert [image["url"] for image in cockpit.shown_since(tmp_path, set())] == ["/images/plot.png"]


async def test_the_phone_s_pictures_are_files_that_the_agent_can_open_and_never_leave_the_inbox(live, monkeypatch):
    vm = AgentVM(live)
    live.vms.boot("gateway", lambda: True, {})
    live.vms.open_to_all = True
    live.vms.images |= {"small": ("image/jpeg", JPEG), "large": ("image/jpeg", JPEG + bytes(5 << 20))}
    media = [{"url": f"{live.vms.server.url}/gateway/images/{name}", "content_type": "image/../../../x.png"} for name in ("small", "large")]
    async with vm.serves("cat", monkeypatch):
        said = (await vm.command("what is this?", media))["text"].splitlines()
        assert said[:3] == ["what is this?", "", "Pictures:"]
        assert re.fullmatch(r"inbox/[0-9a-f]{16}\.jpg", said[3]) and (vm.folder / said[3]).read_bytes() == JPEG
        assert said[4] == "(a picture that could not be fetched)"
        shutil.rmtree(vm.folder / "inbox")
        (live.disks / "elsewhere").mkdir()
        (vm.folder / "inbox").symlink_to(live.disks / "elsewhere")
        many = await vm.command("many", media[:1] * 12)
        assert many["text"].count("could not be fetched") == 10
        assert not list((live.disks / "elsewhere").iterdir())


@beside
async def test_a_command_that_ignores_the_interrupt_is_ended_with_its_children_and_says_what_it_had_said(live):
    a_program(live.disks / "bin", "claude")
    vm = AgentVM(live)
    await vm.start("claude")
    command = asyncio.ensure_future(vm.command("hang on", key="K1"))
    child = vm.folder / "child"
    await live.clock.until(lambda: child.exists() and child.read_text().endswith("\n"))
    health = await vm.health()
    assert health.pop("note") in ("did hang on", "complaint"), "the newest line"
    assert health == {"status": "ok", "busy": True}
    assert (await live.ask("GET", "/health", key=None)).body == {"status": "ok"}
    assert (await live.ask("POST", "/cancel", key=None)).status == 401
    assert (await vm.ask("POST", "/cancel", headers={"Idempotency-Key": "K0"})).body == {"stopped": False}
    began = time.monotonic()
    assert (await vm.ask("POST", "/cancel", headers={"Idempotency-Key": "K1"})).body == {"stopped": True}
    assert time.monotonic() - began < 6
    answer = await command
    assert (answer["text"], answer["exitCode"]) == ("did hang on\ncomplaint", 130)
    await live.clock.until(lambda: not Path(f"/proc/{child.read_text().strip()}").exists())
    assert (await vm.command("hang on", key="K1")) == answer, "it is not run again"
    assert (await vm.command("next"))["text"].strip() == "did next"


async def test_a_stop_that_comes_as_a_command_ends_leaves_its_answer_whole(live, monkeypatch):
    vm = AgentVM(live)
    async with vm.serves("cat; while [ ! -e go ]; do sleep 0.05; done", monkeypatch):
        command = asyncio.ensure_future(vm.command("hello", key="K1"))
        while (await vm.health()).get("note") != "hello":
            await asyncio.sleep(0.02)
        reading = live.threads.holds()
        (vm.folder / "go").touch()
        await live.clock.until(lambda: live.threads.held is None)
        stopped = await vm.ask("POST", "/cancel", headers={"Idempotency-Key": "K1"})
        reading.set()
        answer = await command
    assert (answer["text"], answer["exitCode"], stopped.body) == ("hello", 0, {"stopped": False})


@beside
async def test_what_an_agent_leaves_running_holds_up_no_answer_is_told_and_can_be_ended(live):
    a_program(live.disks / "bin", "claude")
    vm = AgentVM(live)
    await vm.start("claude")
    assert (await vm.ask("POST", "/cancel")).body == {"stopped": False}
    began = time.monotonic()
    assert (await vm.command("leave it"))["text"].strip() == "did leave it"
    assert time.monotonic() - began < 3
    deadline = time.monotonic() + 5
    while await vm.health() != {"status": "ok", "busy": True, "note": "left running: sleep"}:  # until its exec it is called like its parent
        assert time.monotonic() < deadline, await vm.health()
    assert (await vm.ask("POST", "/cancel")).body == {"stopped": True}
    deadline = time.monotonic() + 5
    while await vm.health() != {"status": "ok"}:  # once somebody reaped it
        assert time.monotonic() < deadline, await vm.health()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("agent, text, answer, code", [
    ("tr a-z A-Z | sed 's/$/!/'", "loud", "LOUD!", 0), ("sh -c 'kill -9 $$'", "x", "Killed", 137),
    ("sh -c 'echo only a complaint >&2'", "x", "only a complaint", 0), ("sh -c 'printf %03000d 7 >&2; exit 1'", "x", "0" * 1999 + "7", 1),
    ("sh -c 'echo new:$COCKPIT_NEW'", "x", "new:", 0)])
async def test_any_command_is_an_agent_and_its_complaints_are_shown_when_it_says_nothing_else(tmp_path, agent, text, answer, code):
    for is_new, said in ((False, answer), (True, answer.replace("new:", "new:1"))):
        words, exit_code = await cockpit.Agent(agent, tmp_path).run(text, is_new=is_new)
        assert (words.strip(), exit_code) == (said, code)


@beside
async def test_an_agent_that_is_missing_is_told_at_the_start_and_fails_the_sign_up_with_the_reason(live):
    child = await a_laptop(live, LOCAL_AGENT="gemini", PROVISION_TIMEOUT_S="4", PATH="/usr/bin:/bin")
    missing = "there is no gemini on this VM's PATH; install it or choose another --agent"
    answer = await live.ask("POST", "/provision", key="local", json=sign_up_form())
    assert f"LOCAL_AGENT: {missing}" in child.log, "nobody waits for a sign-up to learn it"
    assert (answer.status, answer.body["code"]) == (504, "vm_unhealthy") and answer.body["detail"].endswith(missing)
    assert "gemini acts without asking, with all that " in child.log and str(live.disks / ".cockpit" / "vms") in child.log
    vm = AgentVM(live)
    await vm.start("gemini", PATH="/usr/bin:/bin")
    health = await vm.ask("GET", "/health")
    assert (health.status, health.body["note"]) == (503, missing)
    assert f"cockpit vm: {missing}" in vm.child.log


@beside
async def test_a_laptop_s_agent_is_stopped_by_text_and_what_waits_runs_next(live):
    a_program(live.disks / "bin", "claude")
    await a_laptop(live, LOCAL_AGENT="claude", PATH=f"{live.disks / 'bin'}:{os.environ['PATH']}")
    vm_id = (await live.ask("POST", "/provision", key="local", json=sign_up_form())).body["vm_id"]
    folder = live.disks / ".cockpit" / "vms" / vm_id
    await texts_locally(live, "hang on")
    await live.clock.until(lambda: (folder / "child").exists())
    await texts_locally(live, "picture")
    await texts_locally(live, "cockpit stop")
    await reads(live, "Stopped.", "did hang on", "did picture")
    shown = await thread(live)
    assert "Exit code" not in shown and shown.count("/media/") >= 2


# A VM's image

@pytest.mark.parametrize("arguments, named", [
    (["--port", "99999"], "set PORT or --port"),
    pytest.param(["--user", "nosuch"], "--user", marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave root behind"))])
@beside
async def test_what_a_vm_cannot_be_started_with_is_named(live, arguments, named):
    child = await Child.start({}, 0, live.disks, "vm", *arguments)
    assert await child.ends() == 1
    assert named in child.log and "Traceback" not in child.log


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root can leave root behind")
@beside
async def test_the_image_s_entry_makes_its_user_s_folders_drops_to_that_user_and_reaps_what_is_orphaned(live):
    live.disks.chmod(0o711)
    home, work = live.disks / "home", live.disks / "work"
    script = ("import cockpit, os, pwd, sys; os.environ['PATH'] = os.defpath; "
              f"pwd.getpwnam = lambda name: pwd.struct_passwd((name, 'x', 65534, 65534, '', {str(home)!r}, '/bin/sh')); sys.exit(cockpit.main(sys.argv[1:]))")
    port = free_port()
    agent = "sh -c 'id -u; pwd; echo $HOME; (sh -c \"sleep 0.3\" &)'"
    process = await asyncio.create_subprocess_exec(
        "unshare", "--pid", "--fork", sys.executable, "-c", script, "vm", "--user", "agent", "--folder", str(work), "--port", str(port), "--agent", agent,
        cwd=HERE, env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    child = await live.adopt(Child(process, port))
    answer = await live.ask("POST", "/command", json={"text": "who?", "media": []})
    assert answer.body["text"].split() == ["65534", str(work), str(home)], answer.body
    assert {(folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) for folder in (home, work)} == {(65534, 0o700)}
    assert live.disks.stat().st_uid == 0, "nothing else is given away"
    deadline = time.monotonic() + 5
    while (await live.ask("GET", "/health")).body != {"status": "ok"}:
        assert time.monotonic() < deadline, "what ended is reaped"
        await asyncio.sleep(0.05)
    inner, = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(inner), signal.SIGTERM)
    assert await child.ends() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_is_a_link_is_given_to_nobody(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "other")
    user = cockpit.pwd.struct_passwd(("agent", "x", 65534, 65534, "", "/", "/bin/sh"))
    with pytest.raises(OSError):
        cockpit.make_folder_of(user, tmp_path / "work")
    assert (tmp_path / "other").stat().st_uid == 0


GIT = """#!/bin/sh
echo "$*" >> "$0.called"
for prompt in "Username for 'https://github.com': " "Password for 'https://x-access-token@github.com': " "Password for 'https://x@evil.example': "
do "$GIT_ASKPASS" "$prompt" >> "$0.told"; done
for last; do :; done
mkdir "$last"
test -e "$0.fails" && echo "remote: Repository not found." >&2 && exit 128
exit 0
"""


@beside
async def test_a_repository_is_cloned_at_the_first_start_with_a_token_that_is_in_no_argument(live):
    git, vm = a_program(live.disks / "bin", "git", GIT), AgentVM(live)
    keys = {"GITHUB_TOKEN": GITHUB, "GITHUB_REPOSITORY": "acme/shop.js"}
    Path(f"{git}.fails").touch()

    async def becomes(status: int, words: str = "") -> None:
        deadline = time.monotonic() + 12
        while (health := await vm.ask("GET", "/health")).status != status or words not in health.text:
            assert time.monotonic() < deadline, health.text
            await asyncio.sleep(0.03)
    await vm.start("cat", **keys)
    await becomes(503, "acme/shop.js could not be cloned: remote: Repository not found.")
    await vm.child.ends(signal.SIGTERM)
    Path(f"{git}.fails").unlink()
    await vm.start("cat", **keys)
    await becomes(200)
    await vm.child.ends(signal.SIGTERM)
    await vm.start("cat", **keys)
    await becomes(200)
    assert Path(f"{git}.called").read_text() == "clone --quiet -- https://github.com/acme/shop.js.git .shop.js.part\n" * 2
    assert (vm.folder / "shop.js").is_dir() and not (vm.folder / ".shop.js.part").exists()
    assert Path(f"{git}.told").read_text() == f"x-access-token\n{GITHUB}\n" * 2, "no other host is told"
    await vm.child.ends(signal.SIGTERM)
    await vm.start("cat", **keys | {"GITHUB_REPOSITORY": "https://github.com/acme/shop"})
    await becomes(503, "GITHUB_REPOSITORY must be OWNER/NAME")


# What an agent texts by itself

async def says(live: World, vm: FakeVM, *arguments: str, **environ: str) -> tuple[int, str]:
    """The exit code of `say` and what it printed."""
    folder = live.disks / "work"
    folder.mkdir(exist_ok=True)
    environ = {"COCKPIT_URL": live.twilio.gateway, "COCKPIT_TOKEN": vm.env["COCKPIT_TOKEN"], "WORKSPACE": str(folder)} | environ
    child = await Child.start(environ, 0, folder, "say", *arguments)
    live.children.append(child)
    return await child.ends(within=20), child.log


@beside
async def test_say_texts_the_owner_with_pictures_and_tells_by_its_exit_code_why_not(live):
    await live.spawn()
    vm = await live.sign_up()
    chart = live.disks / "chart.png"
    chart.write_bytes(PNG)
    assert await says(live, vm, "[3/11] done", str(chart)) == (0, "")
    await live.clock.until(lambda: len(live.twilio.sent) == 2)
    assert live.twilio.sent_to(ANN) == ["[3/11] done", ""]
    copy, = (live.disks / "work" / "images").glob("*.png")
    assert copy.read_bytes() == PNG and live.twilio.media_sent[-1]
    for wrong, why in ((str(HERE / "README.md"), "is not a PNG, JPEG or GIF picture"), ("none.png", "No such file")):
        code, printed = await says(live, vm, "look", wrong)
        assert code == 2 and why in printed
    assert (await says(live, vm, "look", *["none.png"] * 11)) == (2, "cockpit say: 11 pictures are too many; give 10 at most\n")
    code, printed = await says(live, vm, "hello", COCKPIT_URL="")
    assert code == 2
    assert "COCKPIT_URL and COCKPIT_TOKEN are not set" in printed
    assert await says(live, vm, "hello", COCKPIT_URL="nonsense") == (2, printed)
    assert (await says(live, vm, "hello", COCKPIT_TOKEN="vm-x.wrong"))[0] == 1
    for size in [20_000] * 4 + [1] * 6:
        await unasked(live, vm, text="x" * size)
    code, printed = await says(live, vm, "one more")
    assert code == 4 and "at most 40 messages in 60 s" in printed


@beside
async def test_say_waits_for_a_gateway_that_is_away_and_texts_once(live):
    child = await live.spawn()
    vm = await live.sign_up()
    await child.ends(signal.SIGKILL)
    said = asyncio.ensure_future(says(live, vm, "still here"))
    await asyncio.sleep(1)
    await live.adopt(await Child.start(live.environ | {"ROUTES_FILE": str(live.file), "HOST": "127.0.0.1"}, child.port, live.disks))
    assert (await said)[0] == 0
    await live.hears("still here")


async def test_say_gives_up_after_a_minute_and_leaves_no_copy_of_its_pictures(world, monkeypatch):
    vm = await world.ready()
    chart = world.disks / "chart.png"
    chart.write_bytes(PNG)
    for name, value in (("COCKPIT_URL", world.twilio.gateway), ("COCKPIT_TOKEN", vm.env["COCKPIT_TOKEN"]), ("WORKSPACE", str(world.disks))):
        monkeypatch.setenv(name, value)
    await world.stop()
    began = world.clock.elapsed
    with pytest.raises(cockpit.UpstreamUnavailable):
        await world.clock.run(cockpit.say("hello?", [chart], world.clock.clock))
    assert 45 < world.clock.elapsed - began <= 60
    assert not list((world.disks / "images").iterdir())


@beside
async def test_what_say_sent_is_not_sent_again_at_the_end_of_the_command(live):
    await live.spawn()
    owner = await live.sign_up()
    a_program(live.disks / "bin", "claude", f"""#!/bin/sh
mkdir -p images
printf 'GIF89a12' > images/said.gif
printf 'GIF89a12' > elsewhere.gif
{sys.executable} {HERE / 'cockpit.py'} say look images/said.gif elsewhere.gif || exit
printf 'GIF89a34' > images/shown.gif
""")
    url, vm = live.twilio.gateway, AgentVM(live)
    token = owner.env["COCKPIT_TOKEN"]
    await vm.start("claude", COCKPIT_URL=url, COCKPIT_TOKEN=token)
    answer = await live.ask("POST", "/command", key=token, json={"text": "draw", "media": []})
    assert [image["url"] for image in answer.body["images"]] == ["/images/shown.gif"], answer.text


# --- Assembly ---

async def test_production_without_its_settings_exits_2_naming_all_of_them(tmp_path):
    child = await Child.start({"COCKPIT_ENV": "production"}, 0, tmp_path, is_fork=False)
    assert await child.ends() == 2
    assert all(name in child.log for name in REQUIRED) and "Traceback" not in child.log


async def test_a_port_that_is_no_number_is_reported_like_any_setting(tmp_path):
    child = await Child.start({"PORT": "abc"}, 0, tmp_path)
    assert await child.ends() == 2 and "PORT: must be" in child.log and "Traceback" not in child.log
    assert "PUBLIC_URL" not in child.log and "VM_URL" not in child.log, "what nobody set is not to blame"


@pytest.mark.parametrize("name", ["secret", "fly.json"])
async def test_a_file_of_the_local_world_that_cannot_be_read_is_named_with_what_to_do(tmp_path, name):
    (tmp_path / ".cockpit").mkdir(0o700)
    (tmp_path / ".cockpit" / name).write_bytes(b"\xff")
    child = await Child.start({}, free_port(), tmp_path)
    assert await child.ends() == 1
    assert f"cockpit: .cockpit/{name} " in child.log and "rm -r .cockpit" in child.log and "Traceback" not in child.log


async def said_to(port: int, words: str) -> str:
    """What comes back to words that need not be HTTP, until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(words.encode())
    with contextlib.closing(writer):
        return (await asyncio.wait_for(reader.read(), 10)).decode()


UNREADABLE = (f"GET /provision HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\0\r\n\r\n", f"GET /provision HTTP/1.1\r\nHost: a\r\n{GITHUB} {ANN}\r\n\r\n",
              f"{GITHUB} {ANN} {KEY}\r\n\r\n", f"GET /{GITHUB} HTTP/1.1\r\nHost: a\r\nX: {'x' * 20_000}{GITHUB}\r\n\r\n",
              "GET /health HTTP/1.1\r\nHost: a\r\n" + f"X: {GITHUB}\r\n" * 100 + "\r\n")


@beside
async def test_a_request_that_cannot_be_parsed_is_logged_without_its_words(live):
    child = await live.spawn()
    chunked = f"POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{GITHUB} {ANN}\r\n{KEY}\r\n"
    for words in (*UNREADABLE, chunked):
        await said_to(child.port, words)
    await child.ends(signal.SIGTERM)
    assert child.log.count("request_unreadable") >= len(UNREADABLE)
    assert_nothing_secret(child.log)


async def test_strangers_write_no_more_log_lines_than_sixty_a_minute(world, caplog):
    await world.start()
    for _ in range(40):
        await said_to(world.server.port, "no HTTP\r\n\r\n")
        assert (await world.ask("GET", "/provision", key="wrong")).status == 401
    written = [record.getMessage() for record in caplog.records]
    assert written.count("request_unreadable") + written.count("request_refused") == 60
    await world.clock.advance(61)
    await world.ask("GET", "/provision", key="wrong")
    told = [record.fields for record in caplog.records if record.getMessage() == "warnings_left_out"]
    assert told == [{"count": 20}]


@pytest.mark.parametrize(("lines", "status"), [(14, 200), (17, 400)])
async def test_a_head_of_more_than_16_kib_is_refused(world, lines, status):
    await world.start()
    answer = await world.ask("GET", "/health", headers={f"X-{n:02}": "x" * 1024 for n in range(lines)})
    assert answer.status == status
    assert answer.body.get("code") == (None if status == 200 else "malformed")


@beside
async def test_a_body_that_aiohttp_s_parser_in_python_cannot_read_is_refused_and_logged_without_its_words(live):
    child = await live.spawn(is_fork=False, AIOHTTP_NO_EXTENSIONS=1)
    answers = []
    for key in (KEY, "wrong"):
        reader, writer = await asyncio.open_connection("127.0.0.1", child.port)
        writer.write(f"POST /provision HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
                     "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n".encode())
        await asyncio.sleep(0.3)  # the call has begun
        writer.write(f"{GITHUB} {ANN}\r\n".encode())
        with contextlib.closing(writer):
            answers.append((await asyncio.wait_for(reader.readline(), 15)).split()[1])
            await asyncio.wait_for(reader.read(), 15)
    await child.ends(signal.SIGTERM)
    assert answers == [b"400", b"401"]
    assert_nothing_secret(child.log)


@pytest.mark.parametrize("words", UNREADABLE, ids=["header", "no-colon", "no-http", "too-long", "too-many-lines"])
async def test_what_cannot_be_parsed_is_answered_by_a_problem_that_echoes_nothing(world, words):
    await world.start()
    head, _, body = (await said_to(world.server.port, words)).partition("\r\n\r\n")
    assert " 400 " in head.splitlines()[0]
    assert "Content-Type: application/problem+json" in head
    assert json.loads(body)["code"] == "malformed"
    assert not any(secret in head + body for secret in (KEY, GITHUB, ANN))


@beside
async def test_a_caller_who_hangs_up_in_the_middle_of_a_body_is_no_error_of_ours(live):
    child = await live.spawn()
    for length in ("Content-Length: 100\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
        _, writer = await asyncio.open_connection("127.0.0.1", child.port)
        writer.write(f"POST /provision HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n{length}".encode())
        await asyncio.sleep(0.1)
        writer.close()
    assert (await live.ask("GET", "/health")).status == 200
    await child.ends(signal.SIGTERM)
    assert "Traceback" not in child.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@beside
async def test_a_signal_ends_the_process_with_0_in_time_and_routes_survive(live, number):
    child = await live.spawn(is_fork=number != signal.SIGINT)
    await live.sign_up()
    began = time.monotonic()
    assert await child.ends(number) == 0 and time.monotonic() - began < 5
    assert live.saved["routes"][ANN]["state"] == "ready"
    await live.spawn()
    await live.text("hello again")
    await live.hears("ran: hello again")


@pytest.mark.parametrize("cloud, call", [("twilio", "list"), ("fly", "org_machines")])
@beside
async def test_a_signal_also_ends_a_start_that_waits_for_a_cloud(live, cloud, call):
    gate = getattr(live, cloud).holds(call)
    child = await live.spawn(wait=False, BACKFILL_S=60)
    await live.clock.until(gate.arrived.is_set)
    began = time.monotonic()
    assert await child.ends(signal.SIGTERM) == 0 and time.monotonic() - began < 3 and "Traceback" not in child.log


def test_both_files_name_what_they_need_for_uv():
    for name, needs in (("cockpit.py", ["aiohttp"]), ("test_cockpit.py", ["aiohttp", "pytest", "pytest-aiohttp"])):
        block = re.match(r"(?:#!.*\n)?# /// script\n((?:#.*\n)+?)# ///\n", (HERE / name).read_text())
        script = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
        assert [re.match(r"[a-z-]+", need)[0] for need in script["dependencies"]] == needs and "3.11" in script["requires-python"]


def test_the_repository_ships_an_empty_route_file():
    assert json.loads((HERE / "routes.json").read_text()) == {"version": 1, "routes": {}}


def test_the_container_is_slim_unprivileged_and_hears_signals():
    lines = [line for line in (HERE / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    text = "\n".join(lines)
    assert re.search(r"(?m)^FROM python:3\.\d+(\.\d+)?-slim", text) and "COCKPIT_ENV=production" in text and "HEALTHCHECK" in text
    assert re.search(r"(?m)^USER [1-9]\d*:[1-9]\d*$", text) and re.search(r"aiohttp==\d+\.\d+\.\d+ ", text)
    assert re.search(r"(?m)^(CMD|ENTRYPOINT) \[", text), "the exec form: no shell eats the signal"


def test_a_vm_s_image_is_a_target_of_its_own_with_one_agent_and_the_gateway_stays_the_default():
    stages = re.split(r"(?m)^FROM ", (HERE / "Dockerfile").read_text())[1:]
    names = [stage.splitlines()[0].rpartition(" AS ")[2] for stage in stages]
    assert names[-1] == "gateway" and "vm" in names
    vm = stages[names.index("vm")].replace("\\\n", "")
    assert set(re.findall(r"(\w+)\) package=", vm)) == set(cockpit.PRESETS) and "ARG AGENT=claude" in vm and "LOCAL_AGENT=$AGENT" in vm
    assert {"ca-certificates", "gh", "git", "ripgrep"} <= set(re.search(r"install -y --no-install-recommends (.*?) &&", vm)[1].split())
    entry = json.loads(re.search(r"(?m)^ENTRYPOINT (.*)$", vm)[1])
    given = cockpit.parse_arguments(entry[2:])
    assert (entry[:2], given.command, given.user, given.folder) == (["python", "/app/cockpit.py"], "vm", "agent", "/data/work")
    assert f"useradd --uid 10001 --gid 10001 --home-dir /data/home --no-create-home --shell /bin/bash {given.user}\n" in vm
    assert all(re.match(r"[\w./-]+:\d+\.\d+\.\d+-\S*slim", stage) or stage.startswith("base AS") for stage in stages), "every base is pinned and slim"


def test_the_fly_configuration_keeps_one_gateway_running():
    config = tomllib.loads((HERE / ".fly.toml").read_text())
    service = config.get("http_service") or config["services"][0]
    assert config["kill_signal"] == "SIGTERM" and str(config["kill_timeout"]).rstrip("s") == "10" and config["mounts"]
    assert (service["auto_stop_machines"], service["auto_start_machines"]) == ("off", False)


@pytest.mark.parametrize("older", [(3, 8), (3, 9)])
def test_an_older_python_stops_at_a_line_that_says_which_one_is_needed(older):
    before, match, rest = (HERE / "cockpit.py").read_text().partition("\nmatch ")
    ast.parse(before, feature_version=older)
    assert "cockpit needs Python 3.11" in rest.partition("\n")[0]
    with pytest.raises(SyntaxError):
        ast.parse(before + match + rest.partition("\nimport ")[0], feature_version=older)


def test_python_3_10_is_told_in_one_line_which_one_is_needed():
    head = (HERE / "cockpit.py").read_text().partition("import argparse")[0]
    script = "import collections, sys; sys.version_info, sys.version = (3, 10, 13), '3.10.13 (main)'; exec(sys.argv[1])"
    told = subprocess.run([sys.executable, "-c", script, head], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (1, "cockpit needs Python 3.11 or later; this is 3.10.13\n")


def test_without_aiohttp_the_start_says_how_to_get_it():
    script = "import sys; sys.modules['aiohttp'] = None; exec(open('cockpit.py').read())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE)
    assert (told.returncode, told.stderr) == (1, 'cockpit needs aiohttp: pip install "aiohttp>=3.14,<4"\n')


def test_help_says_where_to_go_on(capsys):
    with pytest.raises(SystemExit):
        cockpit.main(["--help"])
    told = capsys.readouterr().out
    assert all(word in told for word in ("doctor", "README.md", "http://127.0.0.1:8080/", "local"))


README = (HERE / "README.md").read_text()


def test_the_manual_lists_every_setting_with_its_default():
    given = dict(re.findall(r'(?:env\.\w+|self\.one_of)\(\s*"([A-Z_]+)"(?:,\s*("[^"]*"|[\d.]+)[,)])?', (HERE / "cockpit.py").read_text()))
    rows = {name: row for row in re.findall(r"(?m)^\|`[A-Z].*", README) for name in re.findall(r"`([A-Z][A-Z_]+)`", row.split("|")[1])}
    assert set(rows) == set(given)
    wrong = [name for name, default in given.items() if default not in ("", '""') and "stand-in" not in rows[name] and f"`{default.strip(chr(34))}`" not in rows[name]]
    assert not wrong


def test_what_the_manual_calls_required_is_required():
    assert {name for row in re.findall(r"(?m)^\|(`[A-Z].*?` \*\*P\*\*)\|", README) for name in re.findall(r"`(.*?)`", row)} == set(REQUIRED)


def test_the_manual_names_every_call_and_every_state():
    described = {path.replace("{signed}", "") for path in API["paths"]} - {"/", "/sms/status", "/media/"}
    assert not [path for path in described if path.removeprefix("/provision/{vm_id}") not in README]
    assert not [state for state in cockpit.STATES if f"`{state}`" not in README]


@pytest.mark.skipif(not shutil.which("curl"), reason="the walk needs curl")
@beside
async def test_the_walk_of_the_manual_runs_as_printed_twice_on_another_port(live):
    walk = re.search(r"## The walk\n.*?```sh\n(.*?)```", README, re.DOTALL)[1]

    async def run() -> tuple[int, str]:
        shell = await asyncio.create_subprocess_exec("sh", "-c", walk, env={"PATH": os.environ["PATH"], "PORT": str(port)}, stdin=subprocess.DEVNULL,
                                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = await asyncio.wait_for(shell.communicate(), 40)
        return shell.returncode, said.decode()

    port = free_port()
    assert await run() == (1, f"There is no gateway at http://127.0.0.1:{port}. Start it in another terminal, or set PORT.\n")
    await live.adopt(await Child.start({}, port, live.disks, is_fork=False))
    for _ in range(2):
        status, said = await run()
        assert status == 0, said
        assert re.fullmatch(rf"""The VM is cockpit-vm-\w+
phone:   hello
cockpit: hello
The VM was killed.
phone:   are you still there\?
cockpit: {re.escape(RESTARTING)}
cockpit: are you still there\?
The VM is gone \(204\).
""", said), said


async def test_a_dead_host_is_replaced_as_the_manual_says(world):
    vm = await world.ready(BACKFILL_S=60, VERIFY_PHONE="off")
    await world.text("run")
    await world.hears("ran: run")
    sending = world.twilio.holds("send")
    await world.text("answered")
    await world.clock.until(sending.arrived.is_set)
    gate = await world.occupies(vm, "running")
    await world.text("waiting")
    await world.crash()
    gate.open()
    before = world.saved["routes"]
    await world.clock.advance(120)
    world.twilio.missed(ANN, "missed")
    world.file = world.disks / "volume" / "routes.json"  # new, and empty
    world.file.parent.mkdir()
    await world.start()
    await world.clock.until(lambda: len(vm.ran) == 5, 300)
    assert vm.ran == ["run", "answered", "running", "waiting", "missed"], "once each: what it had run it answered from memory"
    assert without(world.saved["routes"][ANN], "awake_since") == without(before[ANN], "steps", "awake_since")
    health = (await world.call("GET", "/health")).body
    assert (health["vms"], health["troubles"]) == ({"ready": 1}, [])


# --- Never lose a text ---

async def test_a_text_answered_200_survives_a_kill_and_runs_before_newer_ones(world):
    vm = await world.ready()
    vm.away = 503
    await world.text("one")
    await world.text("two")
    await world.crash()  # at once after the 200
    vm.away = 0
    await world.start()
    await world.text("three")
    await world.clock.until(lambda: "ran: three" in world.twilio.sent_to(ANN))
    assert vm.ran == ["one", "two", "three"]
    assert [body for body in world.twilio.sent_to(ANN) if body != RESTARTING] == ["ran: one", "ran: two", "ran: three"]


async def test_a_text_in_the_vm_s_hands_goes_again_with_its_key_after_a_restart(world):
    vm = await world.ready()
    gate = vm.holds()
    await world.text("deploy")
    await world.text("next")
    await world.clock.until(gate.arrived.is_set)
    await world.crash_and_restart()
    await world.clock.advance(10)
    gate.open()
    await world.hears("ran: deploy", "ran: next")
    keys = {command.key for command in vm.asked if command.text == "deploy"}
    assert vm.ran == ["deploy", "next"] and len(keys) == 1


async def test_many_restarts_of_the_gateway_are_no_fault_of_the_text(world):
    vm = await world.ready()
    gate = await world.occupies(vm, "long")
    for _ in range(4):
        await world.crash_and_restart()
        await world.clock.settle()
    gate.open()
    await world.hears("ran: long")


async def test_an_answer_already_received_is_sent_and_never_run_again(world):
    vm = await world.ready()
    world.twilio.fails("send", 503, times=10_000, code=20503)
    await world.text("deploy")
    await world.clock.until(lambda: world.twilio.count("send"))
    await world.crash()
    world.twilio.heals("send")
    vm.away = 503  # nobody asks it again
    await world.start()
    await world.hears("ran: deploy")
    assert len(vm.asked) == 1


@pytest.mark.parametrize("arrived", [True, False], ids=["arrived", "did not arrive"])
async def test_an_answer_whose_sending_was_cut_by_a_kill_is_looked_up_first(world, arrived):
    vm = await world.ready()
    vm.answer = lambda text: {"text": "“done” – it’s…", "images": [], "exitCode": 0, "durationMs": 1}
    gate = world.twilio.holds("send", after=arrived)
    await world.text("deploy")
    await world.clock.until(gate.arrived.is_set)
    assert len(world.twilio.sent) == arrived
    await world.crash_and_restart()
    await world.clock.advance(60)
    assert len(world.twilio.sent) == 1 and world.twilio.count("list") and world.twilio.count("send") == (1 if arrived else 2)


async def test_only_the_parts_that_did_not_arrive_are_sent_after_a_kill(world):
    vm = await world.ready()
    vm.answer = lambda text: {"text": "y" * 4300, "images": [], "exitCode": 0, "durationMs": 1}
    parts = cockpit.split_text("y" * 4300)
    gate = world.twilio.holds("send")
    world.twilio._faults["send"].appendleft(Fault(after=True, gate=(first := Gate())))
    first.open()
    await world.text("long")
    await world.clock.until(gate.arrived.is_set)
    assert world.twilio.sent_to(ANN) == parts[:1]
    await world.crash_and_restart()
    await world.hears(*parts)


async def test_a_sid_is_remembered_across_restarts(world):
    vm = await world.ready()
    await world.text("once", MessageSid="SM" + "1" * 32)
    await world.hears("ran: once")
    for restart in (world.restart, world.crash_and_restart):
        await restart()
        assert (await world.text("once", MessageSid="SM" + "1" * 32)).said == ""
        await world.clock.advance(5)
    assert vm.ran == ["once"]


async def test_nothing_of_a_vm_that_is_gone_reaches_the_number_s_next_vm(world):
    vm = await world.ready()
    vm.away = 503
    await world.text("for the old one")
    await world.hears(RESTARTING)
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    heir = await world.sign_up()
    await world.crash_and_restart()
    await world.text("for the new one")
    await world.clock.until(lambda: heir.ran)
    await world.clock.advance(60)
    assert heir.ran == ["for the new one"] and not vm.ran


@pytest.mark.parametrize("how", ["restart", "crash_and_restart"])
async def test_a_text_during_set_up_is_answered_for_when_the_gateway_dies_too(world, how):
    await world.start()
    _, job = await world.begin(world.fly, "wait_machine")
    await world.text("early")
    await world.hears("Your VM is being set up. Your text is kept.")
    await getattr(world, how)()
    await asyncio.gather(job, return_exceptions=True)
    await world.hears("Your VM is being set up. Your text is kept.", 'Your VM could not be set up. Not run: "early"')
    await world.clock.until(lambda: not world.fly.everything)


async def test_texts_that_arrived_while_nobody_listened_are_fetched_in_order_and_once(world):
    world.twilio.page_cap = 2
    vm = await world.ready(BACKFILL_S=60)
    await world.text("heard")
    await world.hears("ran: heard")
    await world.stop()
    for n in range(5):
        world.twilio.missed(ANN, f"missed {n}")
        world.clock.elapsed += 1
    world.twilio.missed(EVE, "a stranger's")
    await world.start()
    await world.hears("ran: heard", *(f"ran: missed {n}" for n in range(5)))
    world.twilio.missed(ANN, "and one more")
    await world.clock.until(lambda: vm.ran[-1] == "and one more")
    await world.clock.advance(200)
    assert len(vm.ran) == 7 and not world.twilio.sent_to(EVE)


async def test_texts_older_than_the_route_are_left_alone(world):
    world.twilio.missed(ANN, "for whoever had this number before")
    world.clock.elapsed += 5
    vm = await world.ready(BACKFILL_S=60)
    await world.clock.advance(200)
    assert not vm.ran and world.twilio.count("list")


async def test_a_missed_text_that_a_slow_disk_stores_at_the_start_is_run(world, monkeypatch):
    await world.ready()
    await world.stop()
    world.twilio.missed(ANN, "missed")
    commit_once = cockpit.MessageStore.commit_once

    async def slowly(*given: Any) -> str | None:
        known = await commit_once(*given)
        await world.clock.sleep(6)
        return known
    monkeypatch.setattr(cockpit.MessageStore, "commit_once", slowly)
    await world.start(BACKFILL_S=60)
    await world.hears("ran: missed")


async def test_a_text_fetched_too_late_is_not_run(world):
    vm = await world.ready(BACKFILL_S=60)
    await world.stop()
    world.twilio.missed(ANN, "long ago")
    world.clock.elapsed += 700
    await world.start()
    await world.hears('Not run, your VM was away too long: "long ago"')
    assert not vm.ran


async def test_a_refused_text_does_not_come_back_by_the_list(world):
    vm = await world.ready(BACKFILL_S=60, QUEUE_LIMIT=1)
    gate = await world.occupies(vm, "running")
    await world.text("waiting")
    assert "was not kept" in (await world.text("refused")).said
    gate.open()
    await world.clock.advance(200)
    await world.crash_and_restart()
    await world.clock.advance(200)
    assert vm.ran == ["running", "waiting"]


async def test_test_credentials_that_cannot_list_are_said_once_and_the_rest_goes_on(world, caplog):
    world.twilio.fails("list", 403, times=10_000, code=20008)
    await world.ready(BACKFILL_S=60)
    await world.text("hello")
    await world.hears("ran: hello")
    await world.clock.advance(300)
    assert sum("20008" in str(vars(record)) for record in caplog.records) == 1


async def test_a_phone_that_texts_too_much_is_told_once_a_minute(world):
    vm = await world.ready(TEXT_LIMIT=2)
    words = "More than 2 texts a minute. This text was not kept; wait a minute."
    await world.text("one")
    await world.text("two")
    assert (await world.text("three", MessageSid="SM" + "3" * 32)).said == words
    assert (await world.text("three", MessageSid="SM" + "3" * 32)).said == words
    assert (await world.text("four")).said == ""
    await world.clock.advance(61)
    assert (await world.text("five")).said == ""
    await world.clock.until(lambda: vm.ran == ["one", "two", "five"])


@beside
async def test_a_full_disk_refuses_texts_and_sign_ups_loses_nothing_and_heals(live):
    """RLIMIT_FSIZE stands for the full disk: every write beyond one byte of a file fails."""
    child = await live.spawn()
    vm, other = await live.sign_up(ANN), await live.sign_up(BOB)
    gate = await live.occupies(vm, "before")
    _, hard = resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (1, hard))
    teardown = asyncio.ensure_future(live.ask("DELETE", f"/provision/{other.app}"))
    answer = await live.twilio.texts(ANN, "refused")
    assert (answer.status, answer.body["code"]) == (503, "storage") and answer.headers["Retry-After"]
    answer = await live.provision(EVE)
    assert (answer.status, answer.body["code"]) == (503, "storage")
    gate.open()
    await live.hears("ran: before")
    trouble, health = r"disk|storage|cannot be written", await live.call("GET", "/health", key=None)
    assert health.status == 200 and re.search(trouble, health.text)
    assert (await teardown).status in (202, 204)
    await live.clock.until(lambda: set(live.fly.everything) == {vm.app})
    resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    while (answer := await live.twilio.texts(ANN, "after")).status != 200:
        await asyncio.sleep(0.02)
    await live.hears("ran: before", "ran: after")
    while re.search(trouble, (await live.call("GET", "/health", key=None)).text):
        await asyncio.sleep(0.02)
    await child.ends(signal.SIGKILL)
    await live.spawn()
    await live.text("and on")
    await live.hears("ran: before", "ran: after", "ran: and on")
    assert vm.ran == ["before", "after", "and on"]


@beside
async def test_shutdown_settles_what_it_can(live):
    child = await live.spawn(DRAIN_S=3)
    vm = await live.sign_up()
    gate = await live.occupies(vm, "quick")
    child.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 3
    while (await live.ask("GET", "/health", key=None)).status != 503:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert (await live.twilio.texts(ANN, "too late")).status == 503
    gate.open()
    assert await child.ends() == 0
    await live.hears("ran: quick")


@pytest.mark.parametrize("path", ["/provision", "/provision/{}/restart"], ids=["sign-up", "restart"])
@beside
async def test_who_shuts_down_takes_nothing_on(live, path):
    child = await live.spawn(DRAIN_S=5)
    vm = await live.sign_up()
    gate = await live.occupies(vm, "quick")
    child.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 3
    while (await live.ask("GET", "/health", key=None)).status != 503:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    form = sign_up_form(BOB) if path == "/provision" else None
    answer = await live.ask("POST", path.format(vm.app), json=form)
    assert (answer.status, answer.body["code"]) == (503, "draining")
    gate.open()
    assert await child.ends() == 0


@pytest.mark.parametrize("call, path", [("restart_machine", "/provision/{}/restart"), ("create_app", "/provision")], ids=["restart", "sign-up"])
@beside
async def test_who_waits_for_what_a_shutdown_cuts_off_is_told_so(live, call, path):
    child = await live.spawn(DRAIN_S=0.1)
    vm = await live.sign_up()
    gate = live.fly.holds(call)
    form = sign_up_form(BOB) if call == "create_app" else None
    asked = asyncio.ensure_future(live.ask("POST", path.format(vm.app), json=form))
    await live.clock.until(gate.arrived.is_set)
    child.process.send_signal(signal.SIGTERM)
    answer = await asyncio.wait_for(asked, 10)
    assert (answer.status, answer.body["code"]) == (503, "draining")
    assert answer.headers["Retry-After"]
    gate.open()
    assert await child.ends() == 0


@beside
async def test_shutdown_leaves_the_rest_to_the_database(live):
    child = await live.spawn(DRAIN_S=0.1)
    vm = await live.sign_up()
    gate = vm.holds()
    await live.text("slow")
    await live.text("next")
    await live.clock.until(gate.arrived.is_set)
    assert await child.ends(signal.SIGTERM, 5) == 0
    gate.open()
    await live.spawn()
    await live.hears("ran: slow", "ran: next")
    assert vm.ran == ["slow", "next"]


@beside
async def test_a_second_signal_ends_the_process_at_once(live):
    child = await live.spawn(DRAIN_S=30)
    vm = await live.sign_up()
    await live.occupies(vm, "slow")
    child.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.1)
    began = time.monotonic()
    await child.ends(signal.SIGTERM)
    assert time.monotonic() - began < 2


@beside
async def test_no_acknowledged_text_is_lost_out_of_order_or_answered_twice_by_kills(live):
    """COCKPIT_STORM="12,500,8" for the long form: kills, texts, phones (each beyond the third costs a second of Fly's limit)."""
    kills, texts, users = map(int, os.environ.get("COCKPIT_STORM", "4,150,3").split(","))
    phones, chance, taken = PHONES[:users], random.Random(7), defaultdict(list)
    child = await live.spawn(QUEUE_LIMIT=1000)
    vms = dict(zip(phones, await asyncio.gather(*map(live.sign_up, phones)), strict=True))

    async def keeps_texting(phone: str) -> None:
        """Whatever is not acknowledged is delivered again, as Twilio's fallback or the list would."""
        for n in range(texts // len(phones)):
            body, sid = f"{phone[-2:]}:{n}", f"SM{phone[-2:]}{n:030d}"
            while body not in taken[phone]:
                with contextlib.suppress(aiohttp.ClientError):
                    taken[phone] += [body] * ((await live.twilio.texts(phone, body, MessageSid=sid)).status == 200)
                await asyncio.sleep(chance.uniform(0, 0.02))

    storm = asyncio.gather(*map(keeps_texting, phones))
    for _ in range(kills):
        await asyncio.sleep(chance.uniform(0.02, 0.1))
        await child.ends(signal.SIGKILL)
        child = await live.spawn()
    await storm
    for phone, vm in vms.items():
        await live.clock.until(lambda: {f"ran: {body}" for body in taken[phone]} <= set(live.twilio.sent_to(phone)))
        ran = [body for body in vm.ran if body in taken[phone]]
        assert ran == taken[phone], "each acknowledged text is run once, in order"
        heard = [body for body in live.twilio.sent_to(phone) if body != RESTARTING]
        assert heard == [f"ran: {body}" for body in vm.ran], "each answer is sent once, in order, to its own phone"
        assert len({(command.text, command.key) for command in vm.asked}) == len({command.text for command in vm.asked})


async def test_an_answer_still_being_sent_does_not_reach_the_number_s_next_owner(world):
    await world.start()
    vm = await world.sign_up()
    world.twilio.fails("send", 503, times=10_000, code=20503)
    await world.text("my secrets")
    await world.clock.until(lambda: world.twilio.count("send"))
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    await world.sign_up()
    world.twilio.heals("send")
    await world.clock.advance(120)
    await world.hears()


async def test_a_text_cut_off_before_a_kill_and_after_it_is_not_tried_a_third_time(world):
    vm = await world.ready()
    vm.then({"cut": "before"}, {"cut": "before"})
    world.vms.fails("health", 503, times=1000)
    await world.text("rm -rf /")
    await world.hears(RESTARTING)
    await world.crash_and_restart()
    world.vms.heals("health")
    await world.hears(RESTARTING, 'Your VM went away twice while running this; not tried again: "rm -rf /"')
    assert len(vm.asked) == 2


async def test_a_text_s_waiting_is_not_prolonged_by_the_end_of_another_that_was_not_run(world):
    await world.start(VM_AWAY_LIMIT_S=100)
    vm = await world.sign_up()
    vm.away = 503
    await world.text("one")
    await world.clock.advance(50)
    await world.text("two")
    await world.clock.advance(60)
    late = 'Not run, your VM was away too long: "{}"'.format
    await world.hears(RESTARTING, late("one"))
    await world.crash_and_restart()
    await world.clock.advance(50)
    await world.hears(RESTARTING, late("one"), late("two"))


async def test_a_text_that_a_proxy_s_502_met_waits_from_that_moment_also_across_a_restart(world):
    await world.start(VM_AWAY_LIMIT_S=100)
    vm = await world.sign_up()
    vm.away = 502
    await world.text("deploy")
    await world.hears(RESTARTING)
    await world.clock.advance(60)
    await world.restart()
    await world.clock.advance(50)
    await world.hears(RESTARTING, 'No answer after 100 s; it may still be running: "deploy"')


async def test_a_clock_set_back_does_not_prolong_the_wait(world):
    await world.start(VM_AWAY_LIMIT_S=100)
    vm = await world.sign_up()
    vm.away = 503
    await world.text("one")
    await world.hears(RESTARTING)
    await world.crash()
    world.clock.elapsed -= 3600
    await world.start()
    await world.clock.advance(110)
    await world.hears(RESTARTING, 'Not run, your VM was away too long: "one"')


async def test_what_was_known_of_a_vm_that_is_gone_does_not_come_back_with_a_restart(world):
    await world.start()
    vm = await world.sign_up()
    vm.away = 503
    await world.text("hello")
    await world.hears(RESTARTING)
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204
    await world.clock.advance(60)
    await world.crash_and_restart()
    assert "away" not in (await world.call("GET", "/health", key=None)).body["vms"]


async def test_a_text_with_a_date_that_makes_no_sense_holds_up_no_other(world):
    await world.start(BACKFILL_S=60)
    vm = await world.sign_up()
    nonsense = world.twilio.missed(ANN, "from the end of time")
    entry = next(message for message in world.twilio.messages if message["sid"] == nonsense)
    entry |= dict.fromkeys(("date_created", "date_sent", "date_updated"), "Fri, 31 Dec 9999 23:59:59 -1200")
    world.twilio.missed(ANN, "missed")
    await world.clock.until(lambda: "missed" in vm.ran, 200)


async def test_a_missed_text_is_fetched_though_the_list_failed_at_first(world):
    await world.start(BACKFILL_S=60, VM_AWAY_LIMIT_S=7200)
    await world.sign_up()
    await world.text("before")
    await world.hears("ran: before")
    await world.stop()
    world.twilio.missed(ANN, "missed")
    world.clock.elapsed += 3600
    world.twilio.fails("list", 503, times=10_000, code=20503)
    await world.start()
    await world.text("heard")
    await world.clock.advance(100)
    await world.crash_and_restart()
    world.twilio.heals("list")
    await world.hears("ran: before", "ran: heard", "ran: missed")


async def test_an_answer_is_looked_up_once_twilio_lets_us_in_again(world):
    await world.start()
    await world.sign_up()
    gate = world.twilio.holds("send", after=True)
    await world.text("deploy")
    await world.clock.until(gate.arrived.is_set)
    await world.crash()
    world.twilio.fails("list", 401, times=3, code=20003)
    world.twilio.fails("send", 401, times=3, code=20003)
    await world.start()
    await world.clock.advance(600)
    await world.hears("ran: deploy")


async def test_a_gateway_with_nothing_to_do_writes_nothing(world):
    await world.start(BACKFILL_S=60, RECONCILE_S=60)
    await world.sign_up()
    await world.text("hello")
    await world.clock.advance(300)
    on_disk, lists = {file.name: file.stat().st_mtime_ns for file in world.file.parent.iterdir()}, world.twilio.count("list")
    await world.clock.advance(1800)
    assert {file.name: file.stat().st_mtime_ns for file in world.file.parent.iterdir()} == on_disk
    assert world.twilio.count("list") > lists + 20


async def test_a_vm_is_called_gone_only_once_that_is_on_disk(world, monkeypatch):
    vm = await world.ready()
    vm.away = 503
    await world.text("kept")
    await world.hears(RESTARTING)
    replace_file, written = os.replace, threading.Event()

    def slow(source, target):
        if Path(target) == world.file:
            written.wait(5)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", slow)
    teardown = asyncio.ensure_future(world.ask("DELETE", f"/provision/{vm.app}"))
    await asyncio.sleep(0.05)
    asyncio.get_running_loop().call_later(0.05, written.set)
    await world.crash()
    await asyncio.gather(teardown, return_exceptions=True)
    vm.away = 0
    await world.start()
    await world.hears(RESTARTING, "ran: kept")


async def test_a_vm_that_goes_in_the_moment_its_text_would_run_leaves_nothing_behind(world):
    vm = await world.ready()
    vm.away = 503
    await world.text("hello")
    await world.hears(RESTARTING)
    gateway = world.server.runner.app[cockpit.GATEWAY]
    relay = gateway.relay
    state = relay.vms[vm.app]
    await world.clock.run(relay.runner.pause(state, 0))
    await world.clock.advance(30)
    await relay.runner.resume(state)
    gateway.routes.begin_undo(ANN, "torn_down")
    await relay.vm_gone(vm.app, ANN, "torn_down")
    await world.clock.until(lambda: len(world.twilio.sent_to(ANN)) == 2)
    await world.clock.until(lambda: not relay.vms, real=2)


async def test_a_text_to_a_number_not_yet_adopted_is_fetched_however_late_it_is(world):
    await world.start(BACKFILL_S=60, VM_AWAY_LIMIT_S=7200)
    vm = await world.sign_up()
    await world.stop()
    for path in world.file.parent.iterdir():
        path.unlink()
    world.fly.deaf = True
    await world.start()
    assert (await world.twilio.texts(ANN, "kept")).status == 503
    await world.clock.advance(1800)
    world.fly.deaf = False
    await world.hears("ran: kept", within=400)
    assert vm.ran == ["kept"]


# --- Never leave half a VM ---

STEPS = ["create_app", "set_secrets", "allocate_ip", "create_machine", "wait_machine"]


@pytest.mark.parametrize("fault", ["429", "503", "504 after effect", "dropped before", "dropped after"])
@pytest.mark.parametrize("call", STEPS)
async def test_a_passing_fault_at_any_call_is_ridden_out_with_one_app_and_one_machine(world, call, fault):
    await world.start()
    match fault.split():
        case ["dropped", when]:
            world.fly.drops(call, after=when == "after")
        case [status, *late]:
            world.fly.fails(call, int(status), after=bool(late))
    vm = await world.sign_up()
    assert list(world.fly.everything) == [vm.app] and len(world.fly.machines) == 1 and len(world.fly.apps[vm.app].ips) == 1
    await world.text("hello")
    await world.hears("ran: hello")


@pytest.mark.parametrize("call", STEPS)
async def test_a_kill_at_any_call_leaves_no_orphan_and_frees_the_number(world, call):
    await world.start()
    _, job = await world.begin(world.fly, call, after=True)
    await world.crash_and_restart()
    await asyncio.gather(job, return_exceptions=True)
    await world.clock.until(lambda: not world.fly.everything and not world.saved["undo"])
    vm = await world.sign_up()
    await world.clock.advance(100)
    assert list(world.fly.everything) == [vm.app] and set(world.saved["routes"]) == {ANN} and not world.saved["undo"]


@beside
async def test_a_real_kill_during_a_sign_up_leaves_no_orphan_and_frees_the_number(live):
    child = await live.spawn()
    _, job = await live.begin(live.fly, "create_machine", after=True)
    await child.ends(signal.SIGKILL)
    live.fly.forgets_its_callers()
    await asyncio.gather(job, return_exceptions=True)
    await live.spawn()
    await live.clock.until(lambda: not live.fly.everything)
    vm = await live.sign_up()
    assert list(live.fly.everything) == [vm.app]


async def test_an_undo_that_fails_is_kept_and_retried_also_after_a_kill(world):
    await world.start()
    world.fly.fails("create_machine", 400)
    world.fly.fails("delete_app", 500, times=6)
    assert (await world.provision()).status == 502
    vm_id, = world.saved["undo"]
    await world.crash_and_restart()
    assert vm_id in world.saved["undo"]
    await world.clock.until(lambda: not world.fly.everything and not world.saved["undo"], within=400)
    assert world.fly.count("delete_app") >= 7


async def test_an_app_already_gone_is_undone(world):
    vm = await world.ready()
    world.fly.everything.clear()
    assert (await world.call("DELETE", f"/provision/{vm.app}")).status == 204


async def test_sign_ups_beyond_the_limit_wait_their_turn_but_a_taken_phone_is_told_first(world):
    await world.start(PROVISION_LIMIT=1)
    gate, job = await world.begin(world.fly, "create_machine")
    answer = await world.provision(BOB)
    assert (answer.status, answer.body["code"]) == (429, "too_many") and int(answer.headers["Retry-After"]) > 0
    assert (await world.provision(ANN)).body["code"] == "phone_taken"
    gate.open()
    await world.clock.run(job)
    await world.sign_up(BOB)


async def test_vms_beyond_the_limit_are_refused(world):
    vm = await world.ready(VM_LIMIT=1)
    answer = await world.provision(BOB)
    assert (answer.status, answer.body["code"]) == (403, "vm_limit") and world.fly.count("create_app") == 1
    assert (await world.provision(ANN)).body["code"] == "phone_taken"
    await world.call("DELETE", f"/provision/{vm.app}")
    await world.sign_up(BOB)
