# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14,<4"]
# ///
"""cockpit: an engineer texts one phone number and drives the coding agent on a cloud VM of their own.

A text's journey: Twilio calls `POST /sms` -> its signature is checked -> the phone's route is found -> the
text is stored (one fsync, shared) and only then answered 200 -> the VM's run lane posts it to `/command` ->
the answer is stored -> the VM's send lane hands it to Twilio's REST API, part by part. A route comes from
`POST /provision`: one Fly app per user, every step on disk before it is taken, undone if a later one fails.

Sections, each knowing only those above it:

  Errors              the tree, and what a caller is told of each
  Settings            five records, each read from the environment
  Records and keys    routes, messages, phone numbers; everything that is signed
  Log and metrics     one line per event, numbers masked; Prometheus text
  Time                clock, backoff, tasks, bounded memories
  Routes on disk      routes.json
  Messages on disk    routes.json.db: what is in flight and what is remembered
  Calls out           one request, one error, one metric
  Fly                 the Machines API, a method a verb
  Twilio              signatures, splitting, error codes, sending exactly once
  The VM              client of the contract; what it says is not trusted
  Agents              server of the contract, what a VM runs, `say`
  Provisioning        a machine's config and its stamp; one VM's steps; undoing; admission and teardown
  In flight           texts, what is to be told, one record per VM; notices
  Sending             Sender: the send lane of each VM; DeliveryReports
  Running             Watch, Waker, Runner: the run lane of each VM, outages, deadlines
  Taking in           PhoneDoor: pairing and lock; OwnerCommands: `cockpit stop`; Inbox
  Relay               its start and end, what happens to VMs, Backfill
  Fleet               changes, reconciling with Fly, adoption after a lost disk, sleep
  HTTP                Gateway, all parts put together; thin handlers; /health, /metrics
  Page                the operator's page
  Description         the table of calls, /openapi.json
  Local world         stand-ins for both clouds that last
  Assembly            what a start opens and goes on with; its end; doctor; command line
"""

from __future__ import annotations

import sys

# An older Python stops here: before 3.10 `match` is a SyntaxError, which shows this line.
match sys.version_info >= (3, 11):  # cockpit needs Python 3.11 or later
    case False:
        sys.exit(f"cockpit needs Python 3.11 or later; this is {sys.version.split()[0]}")

import argparse
import asyncio
import base64
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import html
import ipaddress
import json
import logging
import mimetypes
import os
import pwd
import random
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import tempfile
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit
from xml.sax.saxutils import escape

try:
    import aiohttp
except ModuleNotFoundError:
    sys.exit('cockpit needs aiohttp: pip install "aiohttp>=3.14,<4"')
from aiohttp import web
from aiohttp.http import HttpProcessingError
from yarl import URL

VERSION = "2.0"
T = TypeVar("T")
Json = dict[str, Any]
log = logging.getLogger("cockpit")


# --- Errors ---
#
# CockpitError
#   SettingsError              settings are missing or wrong: printed, exit 2
#   StoreError                 the state on disk cannot be read or written: 503 storage
#   Refusal(code)              what an HTTP caller is told; STATUS_OF gives its status
#   UpstreamError              Fly or Twilio; knows service, operation, status, request id
#     UpstreamUnavailable      refused, reset, timeout, 429, 5xx: worth another attempt
#     UpstreamRejected         any other 4xx: asking again changes nothing
#       UpstreamNotFound       404
#       NameTaken              the app's name is somebody else's: nothing of ours was made
#     UpstreamUnreadable       2xx with a body that makes no sense: it took effect
#   VmAway, VmBusy, VmSilent, VmFailed       how a hand-over to a VM can end


class CockpitError(Exception):
    """What this program raises on purpose; its text is one line for the operator, without secrets."""


class SettingsError(CockpitError):
    """Settings are missing or wrong; `problems` names each with its remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class StoreError(CockpitError):
    """The state on disk cannot be read or written."""


STATUS_OF = {
    "malformed": 400,
    "unauthorized": 401,
    "bad_signature": 403,
    "vm_limit": 403,
    "forbidden": 403,
    "unknown_vm": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "phone_taken": 409,
    "torn_down": 409,
    "wrong_state": 409,
    "gone": 410,
    "too_large": 413,
    "unsupported_media_type": 415,
    "invalid_request": 422,
    "too_many": 429,
    "internal": 500,
    "fly_rejected": 502,
    "fly_unavailable": 503,
    "no_capacity": 503,
    "storage": 503,
    "draining": 503,
    "vm_unhealthy": 504,
    "vm_unreachable": 504,
}


class Refusal(CockpitError):
    """What an HTTP caller is told: a stable code, a detail, further members of the problem document."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        retry_after_s: int = 0,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.members = members
        self.status = STATUS_OF[code]
        self.headers = dict(headers or {})
        if retry_after_s or self.status in (429, 503):
            self.headers["Retry-After"] = str(retry_after_s or 5)


NO_CAPACITY = "insufficient_capacity"


@dataclass(eq=False)
class UpstreamError(CockpitError):
    """A call to Fly or Twilio failed; `status` is 0 when no answer came."""

    service: str
    operation: str
    detail: str
    _: dataclasses.KW_ONLY
    status: int = 0
    request_id: str = ""
    code: str = ""
    may_have_happened: bool = False
    retry_after_s: float | None = None

    def __str__(self) -> str:
        line = f"{self.service} {self.operation}: {self.status or ''} {self.detail}"
        line = line.replace(":  ", ": ").strip()
        return f"{line} (request id {self.request_id})" if self.request_id else line


class UpstreamUnavailable(UpstreamError):
    """Worth another attempt, if what it may have done can be repeated."""


class UpstreamRejected(UpstreamError):
    """A 4xx: asking again changes nothing."""


class UpstreamNotFound(UpstreamRejected):
    """404: there is no such thing, or not yet, or no longer."""


class NameTaken(UpstreamRejected):
    """The app's name belongs to another organisation."""


class UpstreamUnreadable(UpstreamError):
    """A 2xx that makes no sense: it took effect, what came of it must be looked up."""


@dataclass(eq=False)
class VmAway(CockpitError):
    """The VM was not reached, or the connection to it broke."""

    detail: str
    may_have_reached: bool = False  # the command perhaps got there
    is_drop: bool = False  # it may be what broke it

    def __str__(self) -> str:
        return self.detail


class VmBusy(CockpitError):
    """409: another command is running, or this very one."""


class VmSilent(CockpitError):
    """No answer within VM_COMMAND_TIMEOUT_S."""


class VmFailed(CockpitError):
    """An answer whose status means neither success nor absence."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the VM answered {status}")
        self.status = status


def refusal_for(error: Exception, **about: Any) -> Refusal:
    """What a caller is told of an error that was foreseen; any other is raised as it is."""
    match error:
        case Refusal():
            return error
        case StoreError():
            return Refusal("storage", str(error), **about)
        case UpstreamError():
            about |= {"fly_status": error.status, "request_id": error.request_id}
            about = {name: value for name, value in about.items() if value not in ("", None)}
            if error.code == NO_CAPACITY:
                reason = f"Fly has no room: {error}"
                return Refusal("no_capacity", reason, retry_after_s=60, **about)
            code = "fly_rejected" if isinstance(error, UpstreamRejected) else "fly_unavailable"
            is_refused = error.service == "fly" and error.status in (401, 403)
            remedy = "; check FLY_API_TOKEN and FLY_ORG" if is_refused else ""
            return Refusal(code, f"{error}{remedy}", **about)
    raise error


# --- Settings ---

PHONE = re.compile(r"\+[1-9][0-9]{6,14}")
PRINTABLE = r"[\x21-\x2b\x2d-\x7e]"  # no comma: it separates
LOCAL_FOLDER = Path(".cockpit")
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1", "[::1]"}
LOCAL_KEY = "local"
SLEEPER_MEMORY_MB = 2048  # Fly suspends no larger guest


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


SCHEMES = ("http", "https")
TWILIO_NAMES = {"TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "TWILIO_PHONE_NUMBER"}
REQUIRED = {"COCKPIT_API_KEY", "COCKPIT_SECRET", "PUBLIC_URL", "FLY_API_TOKEN", *TWILIO_NAMES}


def is_url(text: str, schemes: Sequence[str] = SCHEMES) -> bool:
    """Whether it is a URL of a server, without user, query or fragment."""
    try:
        parts = urlsplit(text)
        has_port = parts.port != 0
    except ValueError:
        return False
    has_more = parts.query or parts.fragment or parts.username or re.search(r"[\s\\]", text)
    return parts.scheme in schemes and bool(parts.hostname) and has_port and not has_more


class Env:
    """Reads environment variables and collects all that is wrong with them, to be told at once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[str] = []
        mode = self.one_of("COCKPIT_ENV", "local", ("local", "production"))
        self.is_production = mode == "production"

    def wrong(self, name: str, remedy: str) -> None:
        problem = f"{name}: {remedy}"
        if problem not in self.problems:
            self.problems.append(problem)

    def given(self, name: str) -> str:
        return self._environ.get(name, "").strip()

    def text(self, name: str, default: str = "") -> str:
        value = self.given(name)
        if not value and name in REQUIRED and self.is_production:
            self.wrong(name, "is required when COCKPIT_ENV=production; set it")
            return ""
        return value or default

    def matching(self, name: str, default: str, pattern: str, remedy: str) -> str:
        value = self.text(name, default)
        if value and not re.fullmatch(pattern, value):
            self.wrong(name, remedy)
        return value

    def one_of(self, name: str, default: str, choices: Sequence[str]) -> str:
        pattern = "|".join(map(re.escape, choices))
        return self.matching(name, default, pattern, f"must be {' or '.join(choices)}")

    def number(self, name: str, default: float, *, low: float, high: float = 1e9) -> float:
        raw = self.text(name, str(default))
        try:
            value = float(raw)
        except ValueError:
            value = float("nan")
        if low <= value <= high:
            return value
        upper = f"to {high:g}" if high < 1e9 else "up"
        self.wrong(name, f"must be a number from {low:g} {upper}")
        return default

    def whole(self, name: str, default: int, *, low: int, high: int = 10**9) -> int:
        value = self.number(name, default, low=low, high=high)
        if value != int(value):
            self.wrong(name, "must be a whole number")
        return int(value)

    def listed(self, name: str, default: str, pattern: str, remedy: str) -> tuple[str, ...]:
        raw = self.text(name, default)
        values = tuple(part.strip() for part in raw.split(",") if part.strip())
        wrong = [value for value in values if not re.fullmatch(pattern, value)]
        if raw and (wrong or not values):
            given = f" (one given has {len(wrong[0])} characters)" if wrong else ""
            self.wrong(name, remedy + given)
        return values

    def url(self, name: str, default: str, schemes: Sequence[str] = SCHEMES) -> str:
        value = self.text(name, default).rstrip("/")
        if not value or is_url(value, schemes):
            return value
        starts = " or ".join(f"{scheme}://" for scheme in schemes)
        self.wrong(name, f"must be a URL starting with {starts}, without user, query or fragment")
        return default

    def local_origin(self) -> str:
        """Where this process reaches itself."""
        host = self.text("HOST", "127.0.0.1")
        name = "[::1]" if host in ("::1", "::") else "127.0.0.1"
        port = self.whole("PORT", 8080, low=1, high=65535)
        return f"http://{name}:{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """This gateway: who may call it, where it listens, where its state lies."""

    is_production: bool
    api_keys: tuple[str, ...] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    public_url: str
    host: str
    port: int
    routes_file: Path
    gateway_id: str
    onboarding_url: str
    verify_phone: bool
    log_format: str
    metrics_token: str = field(repr=False)
    local_agent: str

    @classmethod
    def read(cls, env: Env) -> GatewaySettings:
        is_production = env.is_production
        made = "make one with: openssl rand -hex 32"
        keys = PRINTABLE + "{16,}" + ("" if is_production else f"|{LOCAL_KEY}")
        schemes = ("https",) if is_production else SCHEMES
        folder = Path() if is_production else LOCAL_FOLDER
        return cls(
            is_production=is_production,
            api_keys=env.listed(
                "COCKPIT_API_KEY",
                LOCAL_KEY,
                keys,
                f"each key needs 16 or more printable characters without spaces; {made}",
            ),
            secrets=env.listed(
                "COCKPIT_SECRET",
                secrets.token_hex(32),
                PRINTABLE + "{32,}",
                f"each secret needs 32 or more printable characters without spaces; {made}",
            ),
            public_url=env.url("PUBLIC_URL", env.local_origin(), schemes),
            host=env.text("HOST", "0.0.0.0" if is_production else "127.0.0.1"),
            port=env.whole("PORT", 8080, low=1, high=65535),
            routes_file=Path(env.text("ROUTES_FILE", str(folder / "routes.json"))),
            gateway_id=env.matching(
                "GATEWAY_ID", "", "[a-z0-9]+", "must be one a start has named"
            ),
            onboarding_url=env.url("ONBOARDING_URL", ""),
            verify_phone=env.one_of("VERIFY_PHONE", "off", ("on", "off")) == "on",
            log_format=env.one_of(
                "LOG_FORMAT", "json" if is_production else "text", ("text", "json")
            ),
            metrics_token=env.text("METRICS_TOKEN"),
            local_agent=env.text("LOCAL_AGENT"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FlySettings:
    """The organisation at Fly that holds the VMs, or the stand-in for it."""

    is_local: bool
    token: str = field(repr=False)
    api_url: str
    org: str
    network: str

    @classmethod
    def read(cls, env: Env) -> FlySettings:
        token = env.matching(
            "FLY_API_TOKEN",
            "",
            r"[\x20-\x7e]+",
            "must be one line of printable characters; make one with: fly tokens create org",
        )
        is_local = not token and not env.is_production
        api_url = env.url("FLY_API_HOSTNAME", "https://api.machines.dev")
        return cls(
            is_local=is_local,
            token=token or secrets.token_hex(16),
            api_url=env.local_origin() + "/_local/fly" if is_local else api_url,
            org=env.matching(
                "FLY_ORG",
                "personal",
                "[A-Za-z0-9-]+",
                "must be an organisation's slug; see: fly orgs list",
            ),
            network=env.matching(
                "FLY_NETWORK",
                "",
                "[A-Za-z][A-Za-z0-9-]*",
                "must be a Fly network's name: letters, digits and dashes, a letter first",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSettings:
    """What a VM is made of and where it is reached; memory in MB, disk in GB."""

    image: str
    app_prefix: str
    regions: tuple[str, ...]
    cpu_kind: str
    cpus: int
    memory_mb: int
    volume_gb: int
    is_public: bool
    url: str

    @classmethod
    def read(cls, env: Env, *, fly_is_local: bool) -> VmSettings:
        is_public = env.one_of("VM_NETWORK", "private", ("private", "public")) == "public"
        url = "https://{app}.fly.dev" if is_public else "http://{app}.flycast:3000"
        if fly_is_local:
            url = env.local_origin() + "/_local/vm/{app}"
        settings = cls(
            image=env.matching(
                "VM_IMAGE",
                "registry.fly.io/sms-cockpit-vm:latest",
                r"[^\s\x00-\x1f]+",
                "must be an image reference",
            ),
            # A vm_id is the prefix, a dash and 8 characters; Fly's app names stay under 63.
            app_prefix=env.matching(
                "VM_APP_PREFIX",
                "cockpit-vm",
                "[a-z][a-z0-9-]{0,52}",
                "must start with a letter and hold a-z, 0-9 and dashes, 53 at most",
            ),
            regions=env.listed(
                "VM_REGION",
                "iad",
                "[a-z]{2,5}",
                "must be Fly region codes separated by commas, such as iad,ewr",
            ),
            cpu_kind=env.one_of("VM_CPU_KIND", "shared", ("shared", "performance")),
            cpus=env.whole("VM_CPUS", 1, low=1, high=64),
            memory_mb=env.whole("VM_MEMORY_MB", 2048, low=256, high=10**7),
            volume_gb=env.whole("VM_VOLUME_GB", 0, low=0, high=500),
            is_public=is_public,
            url=env.text("VM_URL", url).rstrip("/"),
        )
        settings.check_size(env)
        settings.check_url(env)
        return settings

    def check_size(self, env: Env) -> None:
        """Fly's own limits for a guest (flyctl, internal/machine/update.go)."""
        if self.cpu_kind == "shared":
            sizes: Sequence[int] = (1, 2, 4, 6, 8)
            step, least, most = 256, 256, 2048
        else:
            sizes = (1, *range(2, 65, 2))
            step, least, most = 1024, 2048, 8192
        if self.cpus not in sizes:
            choices = ", ".join(map(str, sizes))
            env.wrong("VM_CPUS", f"with VM_CPU_KIND={self.cpu_kind} must be one of {choices}")
            return
        low, high = least * self.cpus, most * self.cpus
        if self.memory_mb % step or not low <= self.memory_mb <= high:
            size = f"a multiple of {step} from {low} to {high}"
            env.wrong("VM_MEMORY_MB", f"with {self.cpus} {self.cpu_kind} CPU(s) must be {size}")

    def check_url(self, env: Env) -> None:
        try:
            is_valid = is_url(self.url.format(app="a", machine_id="b", region="c"))
        except (KeyError, IndexError, ValueError, AttributeError):
            is_valid = False
        if not is_valid:
            names = "{app}, {machine_id} and {region}"
            env.wrong(
                "VM_URL", f"must be an http or https URL in which only {names} are filled in"
            )

    @property
    def guest(self) -> Json:
        """A machine's size, in the words of the Machines API."""
        return {"cpu_kind": self.cpu_kind, "cpus": self.cpus, "memory_mb": self.memory_mb}


@dataclass(frozen=True, slots=True, kw_only=True)
class TwilioSettings:
    """The account at Twilio that texts, or the stand-in for it."""

    is_local: bool
    account_sid: str
    auth_tokens: tuple[str, ...] = field(repr=False)
    phone_number: str
    api_key: str
    api_secret: str = field(repr=False)
    api_url: str

    @classmethod
    def read(cls, env: Env) -> TwilioSettings:
        given = set(filter(env.given, TWILIO_NAMES))
        is_local = not given and not env.is_production
        for name in sorted(TWILIO_NAMES - given) if given and not env.is_production else ():
            others = " and ".join(sorted(given))
            env.wrong(
                name, f"is required together with {others}; set it, or none for the stand-in"
            )
        api_url = env.url("TWILIO_API_URL", "https://api.twilio.com")
        settings = cls(
            is_local=is_local,
            account_sid=env.matching(
                "TWILIO_ACCOUNT_SID",
                "AC" + secrets.token_hex(16),
                "AC[0-9A-Za-z]+",
                "must be the account SID, which starts with AC",
            ),
            auth_tokens=env.listed(
                "TWILIO_AUTH_TOKEN",
                secrets.token_hex(16),
                r"[\x21-\x7e]+",
                "must be the account's auth token, or two separated by a comma while rotating",
            ),
            phone_number=env.matching(
                "TWILIO_PHONE_NUMBER",
                "+15550000000",
                PHONE.pattern,
                "must be in E.164 form, such as +15551234567",
            ),
            api_key=env.text("TWILIO_API_KEY"),
            api_secret=env.text("TWILIO_API_SECRET"),
            api_url=env.local_origin() + "/_local/twilio" if is_local else api_url,
        )
        settings.check(env)
        return settings

    def check(self, env: Env) -> None:
        if bool(self.api_key) != bool(self.api_secret):
            missing = "TWILIO_API_SECRET" if self.api_key else "TWILIO_API_KEY"
            remedy = "set both or neither"
            env.wrong(missing, f"TWILIO_API_KEY and TWILIO_API_SECRET go together; {remedy}")
        if len(self.auth_tokens) > 2:
            env.wrong("TWILIO_AUTH_TOKEN", "at most two, separated by a comma, while rotating")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits and intervals; durations in seconds, 0 switches off where the README says so."""

    provision_timeout_s: float
    provision_limit: int
    vm_limit: int
    reconcile_s: float
    backfill_s: float
    vm_command_timeout_s: float
    vm_away_limit_s: float
    vm_idle_s: float
    text_limit: int
    queue_limit: int
    drain_s: float

    @classmethod
    def read(cls, env: Env) -> Limits:
        return cls(
            provision_timeout_s=env.number("PROVISION_TIMEOUT_S", 300, low=0.1),
            provision_limit=env.whole("PROVISION_LIMIT", 20, low=1),
            vm_limit=env.whole("VM_LIMIT", 0, low=0),
            reconcile_s=env.number("RECONCILE_S", 60, low=0),
            backfill_s=env.number("BACKFILL_S", 60, low=0),
            vm_command_timeout_s=env.number("VM_COMMAND_TIMEOUT_S", 330, low=0.01),
            vm_away_limit_s=env.number("VM_AWAY_LIMIT_S", 600, low=0.01),
            vm_idle_s=env.number("VM_IDLE_S", 0, low=0),
            text_limit=env.whole("TEXT_LIMIT", 30, low=0),
            queue_limit=env.whole("QUEUE_LIMIT", 20, low=1),
            drain_s=env.number("DRAIN_S", 4, low=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything the environment decides, read once."""

    gateway: GatewaySettings
    fly: FlySettings
    vm: VmSettings
    twilio: TwilioSettings
    limits: Limits

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from `environ`.

        Raises SettingsError naming everything that is wrong.
        """
        env = Env(environ)
        fly = FlySettings.read(env)
        settings = cls(
            gateway=GatewaySettings.read(env),
            fly=fly,
            vm=VmSettings.read(env, fly_is_local=fly.is_local),
            twilio=TwilioSettings.read(env),
            limits=Limits.read(env),
        )
        if not env.is_production:
            settings.check_exposure(env)
        if env.problems:
            raise SettingsError(env.problems)
        return settings

    @property
    def has_stand_in(self) -> bool:
        return self.fly.is_local or self.twilio.is_local

    @property
    def sleep_obstacle(self) -> str:
        """Why new VMs are not put to sleep although VM_IDLE_S is set, or nothing."""
        is_large = self.vm.memory_mb > SLEEPER_MEMORY_MB
        remedy = f"set VM_MEMORY_MB to {SLEEPER_MEMORY_MB} or less"
        words = f"VM_IDLE_S: Fly suspends no guest over {SLEEPER_MEMORY_MB} MB; {remedy}"
        return words if is_large and self.limits.vm_idle_s else ""

    def check_exposure(self, env: Env) -> None:
        """Local mode hands out a shell, so none of its conveniences may face more than this machine."""
        public_host = urlsplit(self.gateway.public_url).hostname or ""
        is_exposed = not is_loopback(public_host) or not is_loopback(self.gateway.host)
        beyond = "is refused when PUBLIC_URL or HOST reaches beyond this machine"
        if is_exposed and LOCAL_KEY in self.gateway.api_keys:
            remedy = "set a key of 16 characters or more"
            env.wrong("COCKPIT_API_KEY", f"the key 'local' {beyond}; {remedy}")
        if is_exposed and self.twilio.is_local:
            names = "TWILIO_ACCOUNT_SID, TWILIO_AUTH_TOKEN and TWILIO_PHONE_NUMBER"
            env.wrong("TWILIO_ACCOUNT_SID", f"the stand-in for Twilio {beyond}; set {names}")
        if (
            self.gateway.local_agent
            and not self.twilio.is_local
            and not self.gateway.verify_phone
        ):
            reason = "an agent on this machine takes texts of its owner only"
            env.wrong("VERIFY_PHONE", f"{reason}; set it to on, or unset LOCAL_AGENT")
        if not self.fly.is_local and is_loopback(public_host):
            reason = "a Fly token needs a PUBLIC_URL that Fly's VMs can reach"
            env.wrong("PUBLIC_URL", f"{reason}; set it, or unset FLY_API_TOKEN for the stand-in")


# --- Records and keys ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A phone's VM as routes.json knows it; `extra` carries fields this version does not know."""

    vm_id: str
    machine_id: str = ""
    vm_url: str = ""
    region: str = ""
    volume_id: str = ""
    image: str = ""
    state: str = "ready"
    created_at: str = ""
    step: str = ""
    last_error: str = ""
    key_id: str = ""  # which secret its VM's token was made with
    pairing: str = "0:paired"  # or unpaired; stands in its machine's metadata too
    paired_at: str = ""  # by Twilio's clock; a lock keeps it
    wrong_codes: int = 0  # since the code was new
    closed_until: str = ""  # no code is accepted: too many were wrong
    change: str = ""  # a restart, rotation or upgrade that is not ended yet
    old_image: str = ""  # what an upgrade goes back to
    awake_s: int = 0  # in all, until it last stopped being `ready`
    awake_since: str = ""  # while it is
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: Json) -> Route:
        """Raises ValueError naming the field that is not what it should be."""
        known = {name: stored[name] for name in ROUTE_FIELDS if name in stored}
        for name, value in known.items():
            if type(value) is not KINDS.get(name, str):
                kind = "whole number" if name in KINDS else "text"
                raise ValueError(f"{name} is not a {kind}")
            if name == "pairing" and not PAIRING.fullmatch(str(value)):
                raise ValueError(f"{name} is neither paired nor unpaired")
            if name in SHARED_FIELDS:  # one copy for 100,000 routes
                known[name] = sys.intern(str(value))
        if not known.get("vm_id"):
            raise ValueError("vm_id is missing")
        extra = {name: value for name, value in stored.items() if name not in known}
        return cls(**known, extra=extra)

    def began_to_be_awake(self) -> float | None:
        """Wall clock; None while it is not awake.

        A route of the first version was never asleep.
        """
        return parse_utc(self.awake_since or self.created_at) if self.state == "ready" else None

    def awake_for(self, now: float) -> int:
        """Seconds it was awake in all."""
        began = self.began_to_be_awake()
        return self.awake_s + (0 if began is None else max(0, round(now - began)))

    @property
    def is_paired(self) -> bool:
        return self.pairing.endswith(":paired")

    @property
    def was_paired(self) -> bool:
        """Whether its phone is its owner's, locked or not."""
        return self.is_paired or bool(self.paired_at)

    @property
    def pairing_number(self) -> int:
        return int(self.pairing.partition(":")[0])

    def to_json(self) -> Json:
        stored: Json = {}
        for name, default in ROUTE_FIELDS.items():
            value = getattr(self, name)
            if value != default or name in ALWAYS_WRITTEN:
                stored[name] = value
        return {**stored, **self.extra}


PAIRING = re.compile("[0-9]{1,9}:(un)?paired")
SHARED_FIELDS = {"region", "image", "state", "key_id", "pairing"}
ALWAYS_WRITTEN = {"vm_id", "machine_id", "vm_url", "state"}
KINDS = {"awake_s": int, "wrong_codes": int}  # the others are texts
ROUTE_FIELDS = {f.name: f.default for f in dataclasses.fields(Route) if f.name != "extra"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the onboarding page asks for, checked."""

    phone: str
    credentials: Mapping[str, str] = field(repr=False)
    region: str = ""
    welcome: bool = False
    verify: bool = False


class Address(NamedTuple):
    """Where an owner texts from and to: the channel (`whatsapp:` or nothing) and our number there."""

    channel: str = ""
    number: str = ""  # ours; empty: TWILIO_PHONE_NUMBER


USUAL_ADDRESS = Address()


class InboundMessage(NamedTuple):
    """A text as Twilio delivers it; `arrived` is wall-clock seconds."""

    sid: str
    sender: str
    recipient: str
    body: str
    arrived: float
    media: Sequence[Sequence[str]] = ()  # (url, content type)
    opt_out: str = ""
    is_fetched: bool = False  # from Twilio's list, not by webhook
    dated: float = 0.0  # by Twilio's clock; 0: a webhook does not tell

    @property
    def phone(self) -> str:
        return self.sender.removeprefix(WHATSAPP)

    @property
    def channel(self) -> str:
        return WHATSAPP if self.sender.startswith(WHATSAPP) else ""


WHATSAPP = "whatsapp:"


def normalise_phone(text: str) -> str:
    """A number in E.164 form, spaces, dots, dashes and parentheses removed.

    Raises ValueError.
    """
    phone = re.sub(r"[ .()-]", "", text)
    if not PHONE.fullmatch(phone):
        form = "+, then 7 to 15 digits, the first not 0, such as +15551234567"
        raise ValueError(f"must be a phone number in E.164 form: {form}")
    return phone


def utc_seconds(wall_s: float, timespec: str = "seconds") -> str:
    """RFC 3339 in UTC, whole seconds."""
    moment = datetime.fromtimestamp(wall_s, UTC)
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def utc_millis(wall_s: float) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return utc_seconds(wall_s, "milliseconds")


def parse_utc(text: object) -> float | None:
    """Wall-clock seconds of an RFC 3339 time, or None."""
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
        return moment.astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        return None


to_json = json.JSONEncoder(separators=(", ", ": ")).encode


def json_list(values: Iterable[Any]) -> str:
    """The same of a list, faster where it is empty or holds texts, as it mostly does."""
    return f"[{', '.join(map(to_json, values))}]"


def parse_json(raw: bytes | str) -> Any | None:
    """What a JSON text says; None when it is none."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def object_in(value: Any) -> Json:
    """A JSON value when it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def objects_in(value: Any) -> list[Json]:
    """The objects of a JSON array; none when it is no array."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def base64url(raw: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def basic_auth(user: str, password: str) -> str:
    """The value of an Authorization header (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Keyring:
    """Everything that is signed with COCKPIT_SECRET: the first secret signs, all of them verify."""

    LINK_S = 86_400.0

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = {self.fingerprint(root): root for root in roots}
        self.ids = tuple(self._roots)
        self.current_id = self.ids[0]
        self.vm_token = functools.lru_cache(4000)(self._vm_token)

    @staticmethod
    def fingerprint(root: str) -> str:
        """A short name for a secret, from which it cannot be found."""
        return hashlib.sha256(b"cockpit key " + root.encode()).hexdigest()[:8]

    def sign(self, text: str, key_id: str = "") -> str:
        """base64url HMAC-SHA256; by the first secret when `key_id` is none of ours."""
        root = self._roots.get(key_id) or self._roots[self.current_id]
        encoded = text.encode("utf-8", "surrogateescape")
        return base64url(hmac.digest(root.encode(), encoded, "sha256"))

    def verifying_id(self, text: str, signature: str) -> str:
        """Which secret made this signature, or nothing; every one is compared, in constant time."""
        given = signature.encode("utf-8", "surrogateescape")
        found = ""
        for key_id in self._roots:
            if hmac.compare_digest(self.sign(text, key_id).encode(), given):
                found = key_id
        return found

    def _vm_token(self, vm_id: str, key_id: str = "") -> str:
        """The bearer token a VM and the gateway share: derived, stored nowhere."""
        return f"{vm_id}.{self.sign('vm:' + vm_id, key_id)}"

    def vm_of_token(self, token: str) -> str:
        """The vm_id whose token this is, or nothing."""
        vm_id, _, signature = token.partition(".")
        return vm_id if self.verifying_id(f"vm:{vm_id}", signature) else ""

    def pairing_codes(self, route: Route) -> list[str]:
        """Six digits by each secret: the first are shown, all count."""
        codes = []
        for key_id in self.ids:
            signed = self.sign(f"pair:{route.vm_id}:{route.pairing_number}", key_id)
            number = int.from_bytes(base64.urlsafe_b64decode(signed + "="))
            codes.append(f"{number % 10**6:06}")
        return codes

    def fits(self, code: str, route: Route) -> bool:
        """Whether these digits are a VM's present code; in constant time."""
        codes = self.pairing_codes(route)
        return any([hmac.compare_digest(code, known) for known in codes])

    @staticmethod
    def owner_text(vm_id: str, phone: str, gateway_id: str, pairing: str) -> str:
        """What a machine's stamp is signed over: a VM can write its own metadata."""
        return f"owner:{vm_id}:{phone}:{gateway_id}:{pairing}"

    def sign_link(self, vm_id: str, path: str, since: float) -> str:
        """The last part of a `/media` address: what of which VM, until when; no number is in it."""
        about = base64url(f"{vm_id} {int(since + self.LINK_S)} {path}".encode())
        return f"{about}.{self.sign('media:' + about)}"

    def open_link(self, signed: str, now: float) -> tuple[str, str]:
        """Whose VM a link is about and what of it.

        Raises Refusal when it is not ours or too old.
        """
        about, _, signature = signed.partition(".")
        if not self.verifying_id(f"media:{about}", signature):
            raise Refusal(
                "forbidden", "this link was not made here, or was changed; use it as it was sent"
            )
        padded = about + "=" * (-len(about) % 4)
        vm_id, until, path = base64.urlsafe_b64decode(padded).decode().split(" ", 2)
        if int(until) <= now:
            raise Refusal("gone", "this link is over a day old; ask for the image again")
        return vm_id, path


# --- Log and metrics ---

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
WHOLE_PHONE = re.compile(r"(?:\+|%2B)[1-9][0-9]{6,14}")
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
MAX_SERIES = 200  # of one metric: whatever comes above it counts as `other`


def mask_phone(phone: str) -> str:
    """`+15551234567` as `+1555***4567`; shorter numbers show less."""
    digits = phone.removeprefix(WHATSAPP)
    shown = min(5, max(2, len(digits) - 7))
    return f"{digits[:shown]}***{digits[-4:]}"


def mask_phones(text: str) -> str:
    """Text in which no whole phone number is left."""
    if "+" not in text and "%2B" not in text:
        return text
    return WHOLE_PHONE.sub(lambda found: mask_phone(found.group().replace("%2B", "+")), text)


def forms_of(secret: str) -> Iterator[str]:
    """The forms in which an upstream may echo a credential."""
    raw = secret.encode()
    yield secret
    yield json.dumps(secret)[1:-1]
    yield quote(secret, safe="")
    yield quote_plus(secret)
    yield base64.b64encode(raw).decode().rstrip("=")
    yield base64url(raw)


def redact(text: str, hide: Iterable[str] = ()) -> str:
    """Text from outside, made fit for a log line: no secret, no whole number, one line, 500 characters."""
    forms = {form for secret in hide if len(secret) >= 4 for form in forms_of(secret)}
    for form in sorted(forms, key=len, reverse=True):  # one may hold another
        text = text.replace(form, "[hidden]")
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", mask_phones(text)).strip()[:500]


def log_event(
    event: str,
    *,
    level: int = logging.INFO,
    exc_info: BaseException | None = None,
    **fields: object,
) -> None:
    """One log line: a stable event name and its fields; phone numbers go in masked."""
    if not log.isEnabledFor(level):
        return
    trace = (type(exc_info), exc_info, exc_info.__traceback__) if exc_info else None
    # Made by hand: finding the caller's file and line, which nobody reads here, costs more than the rest.
    record = logging.LogRecord(log.name, level, "", 0, event, None, trace)
    record.fields = {name: value for name, value in fields.items() if value not in ("", None)}
    log.handle(record)


def log_warning(event: str, **fields: Any) -> None:
    log_event(event, level=logging.WARNING, **fields)


def log_error(event: str, **fields: Any) -> None:
    log_event(event, level=logging.ERROR, **fields)


class SparingLog:
    """Warnings that strangers cause at will: some a minute, then how many were left out."""

    MOST = 60

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._minute = 0
        self._count = 0

    def warning(self, event: str, **fields: Any) -> None:
        minute = int(self._clock.monotonic() // 60)
        if minute != self._minute:
            if self._count > self.MOST:
                log_warning("warnings_left_out", count=self._count - self.MOST)
            self._minute, self._count = minute, 0
        self._count += 1
        if self._count <= self.MOST:
            log_warning(event, **fields)


class LineFormatter(logging.Formatter):
    """Writes a record as `key=value` text or as JSON, with the request it belongs to."""

    encode = staticmethod(json.JSONEncoder(default=str).encode)

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        line: Json = {
            "at": utc_millis(record.created),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        line |= getattr(record, "fields", {})
        return mask_phones(self.encode(line) if self._as_json else self._as_text(line))

    @staticmethod
    def _as_text(line: Json) -> str:
        words = [line.pop("at")[11:], line.pop("level"), line.pop("event")]
        for name, value in line.items():
            shown = json.dumps(value) if isinstance(value, dict) else str(value)
            words.append(f"{name}={shlex.quote(shown)}")
        return " ".join(words)


def sample_line(name: str, labels: Sequence[str], values: Sequence[str], number: float) -> str:
    """One line of Prometheus text."""
    pairs = zip(labels, values, strict=True)
    inside = ",".join(f'{label}="{value.translate(LABEL_ESCAPES)}"' for label, value in pairs)
    return f"{name}{{{inside}}} {number:.12g}" if inside else f"{name} {number:.12g}"


class Counts:
    """A counter per combination of label values, from small fixed sets: never a number or an id."""

    def __init__(self, meaning: str, *labels: str) -> None:
        self.meaning = meaning
        self.labels = labels
        self.values: dict[tuple[str, ...], int] = {} if labels else {(): 0}

    def add(self, *values: str, by: int = 1) -> None:
        if values not in self.values and len(self.values) >= MAX_SERIES:
            values = ("other",) * len(values)
        self.values[values] = self.values.get(values, 0) + by

    def expose(self, name: str) -> Iterator[str]:
        yield f"# HELP {name}_total {self.meaning}"
        yield f"# TYPE {name}_total counter"
        for values, number in sorted(self.values.items()):
            yield sample_line(f"{name}_total", self.labels, values, number)


class Durations:
    """A histogram of seconds per combination of label values."""

    def __init__(self, meaning: str, *labels: str) -> None:
        self.meaning = meaning
        self.labels = labels
        self.cells: dict[tuple[str, ...], list[float]] = {}
        if not labels:
            self.cells[()] = self._empty()

    @staticmethod
    def _empty() -> list[float]:
        return [0.0] * (len(BUCKETS_S) + 2)  # and those above, and the sum

    def observe(self, seconds: float, *values: str) -> None:
        cells = self.cells.get(values)
        if cells is None:
            cells = self.cells[values] = self._empty()
        cells[bisect_left(BUCKETS_S, seconds)] += 1
        cells[-1] += seconds

    def expose(self, name: str) -> Iterator[str]:
        yield f"# HELP {name}_seconds {self.meaning}"
        yield f"# TYPE {name}_seconds histogram"
        bounds = [f"{bound:g}" for bound in BUCKETS_S] + ["+Inf"]
        for values, cells in sorted(self.cells.items()):
            count = 0.0
            for bound, number in zip(bounds, cells, strict=False):
                count += number
                labels = (*self.labels, "le")
                yield sample_line(f"{name}_seconds_bucket", labels, (*values, bound), count)
            yield sample_line(f"{name}_seconds_sum", self.labels, values, cells[-1])
            yield sample_line(f"{name}_seconds_count", self.labels, values, count)


class Gauge(NamedTuple):
    """A value read at the moment of the question; `values` by the label's value, or under nothing."""

    name: str
    meaning: str
    values: Mapping[str, float]
    label: str = ""
    kind: str = "gauge"

    def expose(self) -> Iterator[str]:
        yield f"# HELP cockpit_{self.name} {self.meaning}"
        yield f"# TYPE cockpit_{self.name} {self.kind}"
        for value, number in self.values.items():
            labels = (self.label,) if self.label else ()
            yield sample_line(f"cockpit_{self.name}", labels, (value,) if labels else (), number)


class Metrics:
    """What is counted and timed; an attribute's name is its metric's, behind `cockpit_`."""

    def __init__(self, clock: Clock) -> None:
        self.texts = Counts("Texts that came in, by what the door said.", "outcome")
        self.texts_finished = Counts("Texts accepted earlier that ended, by how.", "outcome")
        self.messages_sent = Counts("Parts of messages handed to Twilio, by outcome.", "outcome")
        self.vm_messages = Counts("Messages that VMs texted their owners by themselves.")
        self.deliveries = Counts("What Twilio reported of messages sent, by status.", "status")
        self.outages = Counts("Times a VM was found away.")
        self.text_handover = Durations("From a text's webhook to its first hand-over to the VM.")
        self.text_answer = Durations(
            "From a text's webhook to Twilio taking its answer's last part."
        )
        self.provision = Durations("Provisionings, by what came of them.", "outcome")
        self.provision_step = Durations("Steps of provisionings that succeeded.", "step")
        self.store_commit = Durations(
            "One shared transaction of the message store, with its fsync."
        )
        self.store_changes = Counts("Changes written by the message store.")
        labels = ("service", "operation", "status")
        self.upstream = Durations("Calls to Fly and Twilio; `none`: no answer came.", *labels)
        self.twilio_errors = Counts("Errors of Twilio's, by its code.", "code")
        self.refusals = Counts("Requests that were refused, by call and code.", "call", "code")
        self._clock = clock
        self._minutes: dict[int, list[int]] = {}
        self.recent_answers: deque[float] = deque(maxlen=1000)

    def note_text(self, *, failed: bool = False) -> None:
        """Count a text accepted, or one that failed, into the present minute."""
        minute = int(self._clock.monotonic() // 60)
        if minute not in self._minutes:
            kept = {at: cell for at, cell in self._minutes.items() if at > minute - 61}
            self._minutes = kept | {minute: [0, 0]}
        self._minutes[minute][failed] += 1

    def last_hour(self) -> list[list[int]]:
        """Texts and failures of each of the last 60 minutes, the present one last."""
        minute = int(self._clock.monotonic() // 60)
        return [self._minutes.get(at, [0, 0]) for at in range(minute - 59, minute + 1)]

    def texts_a_minute(self) -> float:
        """Texts of the last 60 s; the minute before the present one counts for what is left of it."""
        passed = self._clock.monotonic() % 60 / 60
        before, present = self.last_hour()[-2:]
        return present[0] + before[0] * (1 - passed)

    def quantile(self, share: float) -> float | None:
        """Seconds from text to answer within which this share of the last 1,000 stayed."""
        known = sorted(self.recent_answers)
        return known[min(len(known) - 1, int(share * len(known)))] if known else None

    def expose(self, gauges: Iterable[Gauge]) -> str:
        """Everything in Prometheus's text format."""
        lines: list[str] = []
        for name, metric in vars(self).items():
            if isinstance(metric, Counts | Durations):
                lines += metric.expose(f"cockpit_{name}")
        for gauge in gauges:
            lines += gauge.expose()
        return "\n".join(lines) + "\n"


# --- Time ---

NEVER = float("-inf")
TimeLimit = contextlib.AbstractAsyncContextManager[object]


class Clock:
    """The sources of time and chance, handed to whoever needs them; seconds throughout.

    `now` is the wall clock as it was at the start, moved on by the monotonic one: nobody who sets a
    clock makes a text wait too long or not at all.
    """

    def __init__(
        self,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        time_limit: Callable[[float], TimeLimit] = asyncio.timeout,
        uniform: Callable[[float, float], float] = random.uniform,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self.monotonic = monotonic
        self.sleep = sleep
        self.time_limit = time_limit  # `async with`: TimeoutError when the block takes longer
        self.uniform = uniform
        self._random_bytes = random_bytes
        self._ahead = wall() - monotonic()

    def now(self) -> float:
        return self._ahead + self.monotonic()

    def random_id(self) -> str:
        """Eight random base32 characters, lower case."""
        return base64.b32encode(self._random_bytes(5)).decode().lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How often and how long to try again; pause n is uniform(0, min(cap, base * 2**(n-1)))."""

    base_s: float = 0.5
    cap_s: float = 8.0
    attempts: int = 5
    budget_s: float = 60.0

    def ceiling(self, failures: int) -> float:
        """The longest pause after this many failures (1 or more), seconds."""
        return float(min(self.cap_s, self.base_s * 2.0 ** min(failures - 1, 30)))

    async def pause(self, clock: Clock, failures: int, at_most: float = float("inf")) -> None:
        """Sleep with full jitter."""
        await clock.sleep(min(at_most, clock.uniform(0, self.ceiling(failures))))


def is_unavailable(error: UpstreamError) -> bool:
    """For calls that may be made twice."""
    return isinstance(error, UpstreamUnavailable | UpstreamUnreadable)


def is_surely_undone(error: UpstreamError) -> bool:
    """For calls that must not be made twice."""
    return isinstance(error, UpstreamUnavailable) and not error.may_have_happened


async def retry(
    call: Callable[[], Awaitable[T]],
    backoff: Backoff,
    clock: Clock,
    *,
    when: Callable[[UpstreamError], bool] = is_unavailable,
    find: Callable[[], Awaitable[T | None]] | None = None,
    **about: str,
) -> T:
    """Await `call()` until it succeeds, fails for good, or attempts or budget end; the last error is raised.

    A 429 was never processed, so only the budget bounds it; `Retry-After` is the least pause. `find` looks
    for what a call of unknown outcome made all the same. The log tells by `about` whose call it is.
    """
    failures, throttled, began = 0, 0, clock.monotonic()
    while True:
        try:
            return await call()
        except UpstreamError as error:
            if not when(error):
                raise
            if find and error.may_have_happened and (found := await find()) is not None:
                return found
            throttled += error.status == 429
            failures += error.status != 429
            pause_s = clock.uniform(0, backoff.ceiling(failures + throttled))
            pause_s = max(pause_s, error.retry_after_s or 0)
            passed_s = clock.monotonic() - began
            if failures >= backoff.attempts or passed_s + pause_s > backoff.budget_s:
                raise
            pause: Json = {"attempt": failures + throttled + 1, "pause_s": round(pause_s, 2)}
            log_warning("retry", **about, error=str(error), **pause)
            await clock.sleep(pause_s)


class Tasks:
    """Owns background tasks: none is lost, each failure is logged, all end together."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name=name or None)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, Refusal):
            coroutine = task.get_coro()
            name = getattr(coroutine, "__qualname__", "")
            log_error("task_failed", exc_info=error, task=name)

    async def close(self) -> None:
        """Cancel what still runs and wait for its end."""
        while tasks := list(self._running):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # From Python 3.12 on nobody waits for the callbacks of tasks that have ended.
            self._running.difference_update(tasks)


class Recent(OrderedDict[str, T]):
    """A bounded memory: the last `most` entries, none older than `for_s`."""

    def __init__(self, most: int, for_s: float = float("inf")) -> None:
        super().__init__()
        self._most = most
        self._for_s = for_s
        self._put_at: dict[str, float] = {}

    def put(self, key: str, value: T, now: float) -> None:
        """Remember as the youngest; `now` by any clock that is the same for all entries."""
        self[key] = value
        self.move_to_end(key)
        self._put_at[key] = now
        while len(self) > self._most or self._put_at[next(iter(self))] <= now - self._for_s:
            self.forget(next(iter(self)))

    def is_fresh(self, key: str, now: float) -> bool:
        """Whether it is remembered, and not too old."""
        return key in self and self._put_at[key] > now - self._for_s

    def forget(self, key: str) -> None:
        self.pop(key, None)
        self._put_at.pop(key, None)


# --- Routes on disk ---

ROUTES_RETRY = Backoff(base_s=0.5, cap_s=5)
GONE_AWAKE_S = "gone_awake_s"  # in routes.json: how long VMs that are no more were awake


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def read_nofollow(path: Path) -> bytes:
    """The file's bytes; a link that somebody planted under its name is not followed."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace `path` with `chunks`, all or nothing, mode 0600; raises StoreError.

    Blocks for two fsyncs: call it in a thread.
    """
    temporary = beside(path, ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(f"{path.name} cannot be written: {error.strerror}") from error


def lock_state(path: Path) -> int:
    """One process per state file, until this handle is closed or the process ends.

    Blocking; raises StoreError.
    """
    lock = beside(path, ".lock")
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        remedy = "stop it first, or set ROUTES_FILE to another file"
        raise StoreError(f"another cockpit is using {path}; {remedy}") from error
    except OSError as error:
        remedy = "check that the folder exists and is writable"
        raise StoreError(f"{lock} cannot be locked: {error.strerror}; {remedy}") from error
    return handle


class StoredRoutes(NamedTuple):
    """routes.json, read and checked."""

    gateway_id: str
    routes: dict[str, Route]
    undo: dict[str, Json]
    extra: Json


def parse_routes(text: bytes) -> StoredRoutes:
    """Raises ValueError saying what is wrong with the file; StoreError when a newer cockpit wrote it."""
    stored = json.loads(text)
    if not isinstance(stored, dict):
        raise ValueError("it does not hold a JSON object")
    if type(stored.get(GONE_AWAKE_S, 0)) is not int:
        raise ValueError(f'its "{GONE_AWAKE_S}" is not a whole number')
    version = stored.pop("version", None)
    if type(version) is not int or version < 1:
        raise ValueError('it has no "version"')
    if version > 1:  # no older copy may then take its place
        newer = f'the routes are of "version" {version}, which a newer cockpit wrote'
        raise StoreError(f"{newer}: run that one (nothing was overwritten)")
    stored.pop("pool", None)  # of the first version: a sweep reports its machines
    gateway_id, undo = stored.pop("gateway_id", ""), stored.pop("undo", {})
    section, routes = stored.pop("routes", {}), {}
    is_usable = (
        isinstance(section, dict) and isinstance(undo, dict) and isinstance(gateway_id, str)
    )
    if not is_usable or not all(isinstance(entry, dict) for entry in undo.values()):
        raise ValueError('its "routes", "undo" or "gateway_id" is not what it should be')
    for phone in list(section):
        if not PHONE.fullmatch(phone):
            raise ValueError(f"a route's key is not a phone number: {mask_phone(phone)}")
        try:
            # 100,000 of them: not both at once.
            routes[phone] = Route.from_json(section.pop(phone))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the route of {mask_phone(phone)} is unusable: {error}") from error
    if len({route.vm_id for route in routes.values()}) != len(routes):
        raise ValueError("one vm_id stands under two numbers")
    return StoredRoutes(gateway_id, routes, undo, stored)


def read_routes(path: Path) -> tuple[StoredRoutes, str]:
    """routes.json, or its last good copy and a note saying so; raises StoreError."""
    reasons = []
    for candidate in (path, beside(path, ".bak")):
        try:
            stored = parse_routes(read_nofollow(candidate))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            reasons.append(f"{candidate} cannot be used: {error}")
            continue
        if candidate == path:
            return stored, ""
        reason = reasons[0] if reasons else f"{path} is missing"
        return stored, f"{reason}; the last good copy {candidate.name} was used"
    if reasons:
        remedy = "mend it or put back a good copy (nothing was overwritten)"
        raise StoreError(f"{'; '.join(reasons)}; {remedy}")
    return StoredRoutes("", {}, {}, {}), ""


def fail(waiter: asyncio.Future[None], error: StoreError) -> None:
    """Tell whoever waits; nobody may, any more, and that is no fault to be logged."""
    waiter.set_exception(error)
    waiter.exception()


class RouteStore:
    """The routes and what is being undone, in memory and in routes.json.

    Changes take effect in memory at once; `commit` waits until they are on disk.
    """

    def __init__(self, path: Path, clock: Clock, tasks: Tasks) -> None:
        """Reads the file (blocking); raises StoreError.

        The caller holds the file's lock.
        """
        self.path = path
        self._clock = clock
        self._tasks = tasks
        stored, self.recovery_note = read_routes(path)
        self.closed_because = ""  # why there may be more routes than these
        self.is_new = not stored.gateway_id
        self.gateway_id = stored.gateway_id or clock.random_id()
        self.routes = stored.routes
        self.undo = stored.undo
        self._extra = stored.extra
        self.states: Counter[str] = Counter()
        self._awake_s = 0.0  # of all VMs, less the moments since when those awake are so
        self._awake_now = 0
        self._lines: dict[str, bytes] = {}  # each route as in the file, ready to be joined
        self._phone_of: dict[str, str] = {}  # by vm_id and by machine id
        for phone, route in self.routes.items():
            self._index(phone, route)
        self._vm_ids = sorted(route.vm_id for route in self.routes.values())
        self._written: asyncio.Future[None] | None = None  # what commits wait for, if any do
        self._writer: asyncio.Task[None] | None = None
        self.trouble = ""

    def _count(self, route: Route, by: int) -> None:
        began = route.began_to_be_awake()
        self.states[route.state] += by
        self._awake_s += by * (route.awake_s - (began or 0.0))
        self._awake_now += by * (began is not None)

    def awake_seconds(self) -> float:
        """How long VMs were awake, all told: what a month costs."""
        gone: int = self._extra.get(GONE_AWAKE_S, 0)
        return gone + self._awake_s + self._awake_now * self._clock.now()

    def _index(self, phone: str, route: Route) -> None:
        self._count(route, 1)
        self._lines[phone] = f",\n{to_json(phone)}: {to_json(route.to_json())}".encode()
        self._phone_of[route.vm_id] = phone
        if route.machine_id:
            self._phone_of[route.machine_id] = phone

    def put(self, phone: str, route: Route) -> None:
        """A route that enters or leaves `ready` has its time awake counted."""
        before, now = self.routes.get(phone), self._clock.now()
        if before is None or before.state != route.state:
            awake_s = before.awake_for(now) if before else route.awake_s
            since = utc_seconds(now) if route.state == "ready" else ""
            route = replace(route, awake_s=awake_s, awake_since=since)
        self.drop(phone)
        self.routes[phone] = route
        self._index(phone, route)
        insort(self._vm_ids, route.vm_id)

    def drop(self, phone: str) -> None:
        route = self.routes.pop(phone, None)
        if route is None:
            return
        self._count(route, -1)
        del self._lines[phone], self._phone_of[route.vm_id]
        self._phone_of.pop(route.machine_id, None)
        del self._vm_ids[bisect_left(self._vm_ids, route.vm_id)]

    async def update(self, vm_id: str, **changes: str) -> None:
        """Change a route that is still there, on disk; raises StoreError."""
        if found := self.find(vm_id):
            phone, route = found
            changed = replace(route, **changes)  # type: ignore[arg-type]
            if changed != route:
                self.put(phone, changed)
                await self.commit()

    def begin_undo(self, phone: str, reason: str, error: str = "") -> None:
        """Move a route to the undo section, which frees its number in the same write."""
        route = self.routes[phone]
        self._extra.setdefault(GONE_AWAKE_S, 0)
        self._extra[GONE_AWAKE_S] += route.awake_for(self._clock.now())
        self.drop(phone)
        entry = route.to_json() | {"phone_number": phone, "reason": reason}
        self.undo[route.vm_id] = entry | ({"last_error": error} if error else {})

    def find(self, vm_id: str) -> tuple[str, Route] | None:
        """The phone and route of a vm_id or machine id."""
        phone = self._phone_of.get(vm_id)
        return (phone, self.routes[phone]) if phone else None

    def of(self, vm_id: str) -> Route | None:
        """The route of a vm_id or machine id."""
        return self.routes.get(self._phone_of.get(vm_id, ""))

    def page(self, after: str, limit: int) -> list[str]:
        """Up to `limit` vm_ids behind `after`, in order."""
        start = bisect_right(self._vm_ids, after)
        return self._vm_ids[start : start + limit]

    async def commit(self) -> None:
        """Wait until every change made so far is on disk; raises StoreError (the write is tried on)."""
        if self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        if self._writer is None:
            self._writer = self._tasks.start(self._write_while_needed(), "write routes")
        await asyncio.shield(self._written)

    async def _write_while_needed(self) -> None:
        failures = 0
        written: asyncio.Future[None] | None = None
        try:
            while self._written or failures:
                written, self._written = self._written, None
                content = self._content()
                try:
                    await asyncio.to_thread(write_atomically, self.path, content)
                except StoreError as error:
                    failures += 1
                    self.trouble = str(error)
                    log_error("routes_not_written", error=str(error))
                    if written:
                        fail(written, error)
                    await ROUTES_RETRY.pause(self._clock, failures)
                    continue
                failures, self.trouble = 0, ""
                if written:
                    written.set_result(None)
                # After they are let go: the copy only guards against later damage to the file.
                with suppress(StoreError):
                    copy = beside(self.path, ".bak")
                    await asyncio.to_thread(write_atomically, copy, content)
        finally:
            self._writer = None
            for cut_off in (written, self._written):
                if cut_off and not cut_off.done():
                    reason = f"{self.path.name} was not written: shutting down"
                    fail(cut_off, StoreError(reason))

    def _content(self) -> list[bytes]:
        head = to_json({"version": 1, "gateway_id": self.gateway_id, **self._extra})[:-1]
        tail = f'\n}}, "undo": {to_json(self.undo)}}}\n'
        lines = list(self._lines.values())
        lines[:1] = [line.removeprefix(b",") for line in lines[:1]]
        return [f'{head}, "routes": {{'.encode(), *lines, tail.encode()]

    async def close(self) -> None:
        """Write what is unwritten, if the disk lets us."""
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(2):
                if writer := self._writer:
                    await self.commit()
                    await asyncio.shield(writer)


# --- Messages on disk ---
#
# One SQLite file, written by one thread. What comes together shares one transaction and one fsync.

SCHEMA_VERSION = 1
SCHEMA = """
BEGIN;
CREATE TABLE texts (  -- accepted and not yet finished
    sid TEXT PRIMARY KEY, vm_id TEXT, arrived REAL, body TEXT, media TEXT, channel TEXT, number TEXT,
    handed_over INTEGER, drops INTEGER, dropped_at REAL);
CREATE TABLE outbound (  -- to be sent and not yet taken by Twilio
    id TEXT PRIMARY KEY, vm_id TEXT, phone TEXT, channel TEXT, number TEXT, parts TEXT, images TEXT,
    created_at REAL, sent INTEGER, in_words TEXT);
CREATE TABLE vms (vm_id TEXT PRIMARY KEY, record TEXT);  -- what outlives the messages
CREATE TABLE seen (sid TEXT PRIMARY KEY, at REAL, reply TEXT) WITHOUT ROWID;
CREATE INDEX seen_at ON seen (at);
CREATE TABLE sent (sid TEXT PRIMARY KEY, at REAL) WITHOUT ROWID;  -- SIDs of our own messages
CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL);
PRAGMA user_version = 1;
COMMIT;
"""
SEE = "INSERT OR IGNORE INTO seen VALUES (?, ?, ?)"
NOTE_SENT = "INSERT OR IGNORE INTO sent VALUES (?, ?)"
ADD_TEXT = "INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
ADD_OUTBOUND = "INSERT OR REPLACE INTO outbound VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
UPDATE_TEXT = "UPDATE texts SET handed_over = ?, drops = ?, dropped_at = ? WHERE sid = ?"
UPDATE_OUTBOUND = "UPDATE outbound SET sent = ?, in_words = ? WHERE id = ?"
END_TEXT = "DELETE FROM texts WHERE sid = ?"
END_OUTBOUND = "DELETE FROM outbound WHERE id = ?"
PUT_VM = "INSERT OR REPLACE INTO vms VALUES (?, ?)"
PATCH_VM = """INSERT INTO vms VALUES (?, ?)
    ON CONFLICT (vm_id) DO UPDATE SET record = json_patch(record, excluded.record)"""
DROP_SENT = """DELETE FROM outbound
    WHERE sent >= json_array_length(parts) + json_array_length(images) OR phone = ''"""
PRUNE_EVERY_S = 60.0
PRUNE = "DELETE FROM {0} WHERE sid IN (SELECT sid FROM {0} WHERE at < ? - {1} LIMIT 5000)"
KEPT_S = {"seen": 2 * 86_400, "sent": 2 * 3600}

Value = str | float | int | None
Change = tuple[str, tuple[Value, ...]]
Row = dict[str, Any]


def storable(value: Value) -> Value:
    """What SQLite can hold: no lone surrogates, numbers within 64 bits."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, int) and abs(value) >= 2**63:
        return float(value)
    return value


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """Changes that are written together or not at all."""

    changes: Sequence[Change]
    see: tuple[str, float, str] | None = None  # only if this SID was never seen: SID, time, reply
    is_kept: bool = False  # tried again until the disk lets it
    waiter: asyncio.Future[str | None] | None = None
    result: str | None = None  # the earlier reply, when the SID was known
    refusal: StoreError | None = None  # SQLite took the rest, not this

    def write(self, database: sqlite3.Connection) -> None:
        if self.see and not database.execute(SEE, self.see).rowcount:
            query = "SELECT reply FROM seen WHERE sid = ?"
            (self.result,) = database.execute(query, self.see[:1]).fetchone()
            return
        for statement, values in self.changes:
            database.execute(statement, values)

    def settle(self, error: StoreError | None) -> None:
        """Tell who waits, once; what is tried again then has nobody who waits."""
        waiter, self.waiter = self.waiter, None
        if waiter is None or waiter.done():
            return
        if failure := self.refusal or error:
            waiter.set_exception(failure)
        else:
            waiter.set_result(self.result)


WriteEntry = Callable[[Entry, sqlite3.Connection], None]


@dataclass(eq=False)
class MessageStore:
    """What is in flight and what is remembered; nothing is acknowledged before it is here."""

    RETRY_S = 1.0
    GATHER_S = 0.003

    path: Path
    clock: Clock
    tasks: Tasks
    metrics: Metrics
    database: sqlite3.Connection = field(init=False)
    inode: int = 0  # of its file
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "messages"))
    at_work: int = 0  # calls in the thread or on their way to it
    queue: list[Entry] = field(default_factory=list)
    writer: asyncio.Task[None] | None = None
    wanted: asyncio.Event = field(default_factory=asyncio.Event)  # somebody waits for an entry
    pruned_at: float = NEVER
    trouble: str = ""

    async def open(self) -> None:
        """Open or make the database; one that is damaged is set aside.

        Raises StoreError.
        """
        try:
            await self._in_thread(self._connect)
        except StoreError:
            await self._in_thread(self.database.close)
            raise
        except (sqlite3.OperationalError, OSError) as error:
            raise StoreError(
                f"{self.path.name} cannot be opened: {getattr(error, 'strerror', error)}"
            ) from error
        except sqlite3.DatabaseError as error:
            # What was in flight is lost, but never a start.
            suffix = f".damaged-{int(self.clock.now())}"
            log_error("messages_damaged", error=str(error), kept_as=self.path.name + suffix)
            await self._in_thread(self._set_aside, suffix)
            await self._in_thread(self._connect)

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        self.at_work += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work, *given)
        finally:
            self.at_work -= 1

    def _connect(self) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self.inode = os.fstat(handle).st_ino
        os.close(handle)
        self.database = database = sqlite3.connect(self.path, isolation_level=None)
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            newer = f"{self.path.name} is of version {version}, which a newer cockpit wrote"
            raise StoreError(f"{newer}: run that one (nothing was overwritten)")
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if version == 0:
            database.executescript(SCHEMA)

    def _set_aside(self, suffix: str) -> None:
        self.database.close()
        for part in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{part}", f"{self.path}{part}{suffix}")

    async def read(self, query: str, *values: Value) -> list[Row]:
        """Rows of the database; raises StoreError."""
        try:
            return await self._in_thread(
                lambda: list(map(dict, self.database.execute(query, values)))
            )
        except sqlite3.Error as error:
            raise StoreError(f"{self.path.name} cannot be read: {error}") from error

    async def known(self, sids: Sequence[str]) -> set[str]:
        """Which of these SIDs were seen; raises StoreError."""
        query = "SELECT sid FROM seen WHERE sid IN (SELECT value FROM json_each(?))"
        return {row["sid"] for row in await self.read(query, to_json(sids))}

    async def commit(self, *changes: Change) -> None:
        """Wait until these are on disk; raises StoreError, and then they are not."""
        await self._wait_for(Entry(changes=changes))

    async def commit_once(self, sid: str, at: float, reply: str, *changes: Change) -> str | None:
        """The same, unless this SID was seen: then nothing is written; returns the reply of that time."""
        return await self._wait_for(Entry(changes=changes, see=(sid, at, reply)))

    async def save(self, *changes: Change) -> None:
        """Wait until these are on disk or the disk has failed once: they are kept and tried again then."""
        with suppress(StoreError):
            await self._wait_for(Entry(changes=changes, is_kept=True))

    def note(self, *changes: Change) -> None:
        """Write these soon; nobody waits."""
        self._enqueue(Entry(changes=changes, is_kept=True))

    async def _wait_for(self, entry: Entry) -> str | None:
        entry.waiter = asyncio.get_running_loop().create_future()
        self._enqueue(entry)
        self.wanted.set()
        return await entry.waiter

    def _enqueue(self, entry: Entry) -> None:
        self.queue.append(entry)
        if self.writer is None:
            self.writer = self.tasks.start(self._write_while_needed(), "write messages")

    async def _write_while_needed(self) -> None:
        try:
            while self.queue:
                # Under load a short pause lets more texts share the fsync.
                await asyncio.sleep(self.GATHER_S if len(self.queue) > 2 else 0)
                batch, self.queue = self.queue, []
                self.wanted.clear()
                error = await self._in_thread(self._write, batch)
                self._note_trouble(error)
                for entry in batch:
                    entry.settle(error)
                if error is None:
                    continue
                kept = [entry for entry in batch if entry.is_kept]
                self.queue = kept + self.queue
                # A failing disk is tried again after a while, or as soon as somebody waits for it.
                with suppress(TimeoutError):
                    async with self.clock.time_limit(self.RETRY_S):
                        await self.wanted.wait()
        finally:
            self.writer = None

    def _note_trouble(self, error: StoreError | None) -> None:
        if error and not self.trouble:
            log_error("messages_not_written", error=str(error))
        elif self.trouble and not error:
            log_warning("messages_written_again")
        self.trouble = str(error or "")

    def _write(self, batch: Sequence[Entry]) -> StoreError | None:
        """All in one transaction; an error is the disk's, and then nothing is written."""
        began = self.clock.monotonic()
        try:
            if os.stat(self.path).st_ino != self.inode:
                raise sqlite3.OperationalError("the file was removed")
            try:
                self._write_together(batch, Entry.write)
            except sqlite3.OperationalError:
                raise
            except Exception:  # SQLite refuses one of them: once more, each apart
                self._write_together(batch, self._write_apart)
        except (sqlite3.Error, OSError) as error:
            reason = getattr(error, "strerror", error)
            return StoreError(f"{self.path.name} cannot be written: {reason}")
        self.metrics.store_commit.observe(self.clock.monotonic() - began)
        self.metrics.store_changes.add(by=sum(len(entry.changes) for entry in batch))
        return None

    def _write_together(self, batch: Sequence[Entry], write: WriteEntry) -> None:
        with self.database:
            self.database.execute("BEGIN IMMEDIATE")
            for entry in batch:
                write(entry, self.database)
            self._prune()

    def _write_apart(self, entry: Entry, database: sqlite3.Connection) -> None:
        """What SQLite refuses is put aside alone, and never tried again."""
        entry.changes = [(sql, tuple(map(storable, values))) for sql, values in entry.changes]
        database.execute("SAVEPOINT entry")
        try:
            entry.write(database)
        except sqlite3.OperationalError:
            raise
        except Exception as error:
            database.execute("ROLLBACK TO entry")
            entry.refusal = StoreError(f"{self.path.name} refuses this: {error}")
            log_error("row_refused", error=str(error))
        database.execute("RELEASE entry")

    def _prune(self) -> None:
        now = self.clock.now()
        if now < self.pruned_at + PRUNE_EVERY_S:
            return
        self.pruned_at = now
        for table, kept_s in KEPT_S.items():
            self.database.execute(PRUNE.format(table, kept_s), (now,))

    async def close(self) -> None:
        """Write what is queued, if the disk lets us; end the thread."""
        if self.writer:
            await self.save()
        await self._in_thread(self.database.close)
        self.thread.shutdown(wait=False)


def journal_changes(journal: bytes, phone_of: Mapping[str, str]) -> Iterator[Change]:
    """The `.journal` of the first version as changes of the database; `phone_of`: by vm_id."""
    for line in journal.splitlines():
        with suppress(AttributeError, KeyError, TypeError, ValueError):  # torn
            record = json.loads(line)
            yield from (*old_changes(record, phone_of), *old_memory(record))
    yield DROP_SENT, ()


def old_changes(record: Json, phone_of: Mapping[str, str]) -> Iterator[Change]:
    """What a record of the first version's journal means now; an unknown one means nothing."""
    address = record.get("channel", ""), record.get("ours", "")
    match record:
        case {"k": "in", "sid": sid, "vm": vm_id, "at": at, "body": body}:
            content = body, to_json(record.get("media", []))
            yield ADD_TEXT, (sid, vm_id, at, *content, *address, bool(record.get("run")), 0, 0)
        case {"k": "run" | "held" as kind, "sid": sid}:
            yield "UPDATE texts SET handed_over = ? WHERE sid = ?", (kind == "run", sid)
        case {"k": "cut", "sid": sid, "n": drops, "at": at}:
            yield UPDATE_TEXT, (True, drops, at, sid)
        case {"k": "out", "id": id_, "vm": vm_id, "at": at, "parts": parts}:
            content = to_json(parts), to_json(record.get("images", []))
            progress = at, record.get("sent", 0), to_json(record.get("in_words", []))
            yield (
                ADD_OUTBOUND,
                (id_, vm_id, phone_of.get(vm_id, ""), *address, *content, *progress),
            )
            for sid in record.get("re", ()):
                yield END_TEXT, (sid,)
        case {"k": "sent", "id": id_, "n": sent}:
            yield "UPDATE outbound SET sent = ? WHERE id = ?", (sent, id_)
        case {"k": "done", "id": id_}:
            yield END_OUTBOUND, (id_,)


def old_memory(record: Json) -> Iterator[Change]:
    """The SIDs that a record of the first version's journal saw, and who opted out by it."""
    seen, opted_out = [], record.get("muted", {})
    if record["k"] == "state":
        seen = record["seen"]
    elif record["k"] in ("in", "seen"):
        seen = [(record["sid"], record["at"])]
    if "who" in record:
        opted_out = {record["who"]: opted_out}
    for sid, at in seen:
        yield SEE, (sid, at, "")
    for who, is_out in opted_out.items():
        channel = WHATSAPP if who.startswith(WHATSAPP) else ""
        memory = to_json({"opted_out": {channel: is_out}})
        yield PATCH_VM, (who.removeprefix(WHATSAPP), memory)


# --- Calls out ---

MAX_UPSTREAM_BYTES = 8 * 1024 * 1024
FRESH_CONNECTION_S = 5.0  # after a cut
# The whole of a call has a time limit of its own.
CONNECT_TIMEOUT = aiohttp.ClientTimeout(sock_connect=10)


async def read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """The body, or None when it is longer than `limit` bytes."""
    body = bytearray()
    while chunk := await response.content.readany():
        body += chunk
        if len(body) > limit:
            response.close()
            return None
    return bytes(body)


def kind_of_failure(status: int) -> type[UpstreamError]:
    """The error class of a status of 300 and above; 408 is Fly's wait running out, or its host's."""
    if status in (408, 429) or status >= 500:
        return UpstreamUnavailable
    return UpstreamNotFound if status == 404 else UpstreamRejected


def read_retry_after(headers: Mapping[str, str], clock: Clock) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date; at most a minute is obeyed."""
    value = headers.get("Retry-After", "")
    try:
        pause_s = float(value)
    except ValueError:
        moment = parse_http_date(value)
        if moment is None:
            return None
        pause_s = moment - clock.now()
    return min(60.0, max(0.0, pause_s))


def parse_http_date(text: object) -> float | None:
    """Wall-clock seconds of a date as HTTP and Twilio write it (RFC 2822), or None."""
    try:
        return parsedate_to_datetime(str(text)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a cloud names its requests and explains its errors; `explain` gives words and a code."""

    service: str
    request_id_header: str
    explain: Callable[[bytes], tuple[str, str]]
    is_unprocessed: Callable[[int], bool]  # by status: such a request surely had no effect


@dataclass(eq=False)
class Upstream:
    """One cloud's API: every request to it goes through `ask`."""

    session: aiohttp.ClientSession
    fresh_session: aiohttp.ClientSession  # a new connection for each request: used after a cut
    dialect: Dialect
    clock: Clock
    metrics: Metrics
    cut_at: float = NEVER
    silent_since: float | None = None  # monotonic: the first call without an answer
    ahead_s: float = 0.0  # of our clock, by the Date of its last answer
    last_date: str | None = None

    async def ask(
        self, operation: str, method: str, url: URL, *, hide: Iterable[str] = (), **sent: Any
    ) -> Any:
        """What it answers, parsed, None when that is empty; raises UpstreamError.

        `timeout_s` bounds the whole of it, `hide` is kept out of errors, the rest is aiohttp's.
        """
        status, headers, raw = await self._send(operation, method, url, **sent)
        self.silent_since = None
        if (date := headers.get("Date")) != self.last_date:
            self.last_date = date
            told = parse_http_date(date)
            if told is not None:
                # A Date is cut to the second, so that its time as we tell it is never in its future.
                self.ahead_s = self.clock.now() - told
        if status >= 300:
            # Whole before it is cut: of a secret cut in two neither half would be found.
            words, code = self.dialect.explain(raw or b"")
            raise kind_of_failure(status)(
                self.dialect.service,
                operation,
                redact(words, hide),
                status=status,
                code=code,
                request_id=headers.get(self.dialect.request_id_header, ""),
                may_have_happened=not self.dialect.is_unprocessed(status),
                retry_after_s=read_retry_after(headers, self.clock),
            )
        value = parse_json(raw) if raw else None
        if value is None and raw != b"":
            reason = "an answer that is not JSON"
            raise UpstreamUnreadable(
                self.dialect.service, operation, reason, status=status, may_have_happened=True
            )
        return value

    async def _send(
        self, operation: str, method: str, url: URL, *, timeout_s: float, **sent: Any
    ) -> tuple[int, Mapping[str, str], bytes | None]:
        """Status, headers and body, the last None when it is too long."""
        status, began, service = 0, self.clock.monotonic(), self.dialect.service
        is_cut = began < self.cut_at + FRESH_CONNECTION_S
        sent |= {"allow_redirects": False, "timeout": CONNECT_TIMEOUT}
        request = (self.fresh_session if is_cut else self.session).request(method, url, **sent)
        try:
            async with self.clock.time_limit(timeout_s), request as response:
                status = response.status
                return status, response.headers, await read_at_most(response, MAX_UPSTREAM_BYTES)
        except (aiohttp.ClientError, TimeoutError) as error:
            now = self.clock.monotonic()
            self.silent_since = self.silent_since or now
            is_reached = not isinstance(error, aiohttp.ClientConnectorError)
            if is_reached:
                self.cut_at = now
            words = f"{'no answer' if is_reached else 'not reached'} ({type(error).__name__})"
            raise UpstreamUnavailable(
                service, operation, words, may_have_happened=is_reached
            ) from error
        finally:
            status_class = f"{status // 100}xx" if status else "none"
            self.metrics.upstream.observe(
                self.clock.monotonic() - began, service, operation, status_class
            )


# --- Fly ---
#
# Facts: Fly's OpenAPI document and docs, and fly-go, its own client.

CAPACITY = re.compile(
    "insufficient (resources|memory)|no capacity|over the allowed quota", re.IGNORECASE
)
RESTING = ("stopped", "suspended")
# How long a new app may stay invisible (fly-go, WaitForApp).
FRESH_APP_S = 60.0
FRESH_APP = Backoff(base_s=0.5, cap_s=2, attempts=1000, budget_s=FRESH_APP_S)
COOKIES_KEPT = 200


def fly_authorization(token: str) -> str:
    """The header: `FlyV1` for macaroons, else `Bearer` (fly-go, tokens.go)."""
    parts = [p for p in re.split(r"[\s,]+", token) if p.lower() not in ("", "bearer", "flyv1")]
    macaroons = [part for part in parts if part.startswith(("fm1r_", "fm1a_", "fm2_"))]
    return "FlyV1 " + ",".join(macaroons) if macaroons else "Bearer " + ",".join(parts)


def explain_fly(raw: bytes) -> tuple[str, str]:
    """Fly's words (`error`, `message`, else all) and its code (`status`)."""
    words, code = parse_json(raw), ""
    if isinstance(words, dict):
        code = str(words.get("status") or "")
        words = words.get("error") or words.get("message") or words
    if not isinstance(words, str):
        words = json.dumps(words) if words else raw.decode("utf-8", "replace")
    # Out of room comes as 400, 403, 409, 412, 422 and 5xx: often only the words tell.
    return words, NO_CAPACITY if CAPACITY.search(words) else code


FLY = Dialect(
    service="fly",
    request_id_header="fly-request-id",
    explain=explain_fly,
    is_unprocessed=lambda status: status == 429,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A Fly machine, as much of it as is acted on."""

    id: str
    state: str
    region: str
    app: str = ""  # named by lists only
    instance_id: str = ""
    created_at: float | None = None
    # Empty when Fly knows it only in part.
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    build: str = ""  # the image by its digest
    last_event: str = ""
    checks_pass: bool = False
    host_ok: bool = True
    memory_mb: int = 0
    keeps_disk: bool = False  # through a cold boot


def parse_machine(stored: Any) -> Machine:
    """Raises what `_call` takes for nonsense when it is none."""
    config = stored.get("config") or {}
    known = config or stored.get("incomplete_config") or {}
    image = stored.get("image_ref") or {}
    name = "/".join(str(image[part]) for part in ("registry", "repository") if image.get(part))
    events, checks = stored.get("events"), stored.get("checks")
    persist = (config.get("rootfs") or {}).get("persist")
    return Machine(
        id=text_in(stored, "id"),
        state=text_in(stored, "state"),
        region=str(stored.get("region") or ""),
        app=str(stored.get("app_name") or ""),
        instance_id=str(stored.get("instance_id") or ""),
        created_at=parse_utc(stored.get("created_at")),
        config=config,
        metadata={str(key): str(value) for key, value in (known.get("metadata") or {}).items()},
        image=str(config.get("image") or ""),
        build=f"{name}@{image['digest']}" if name and image.get("digest") else "",
        last_event=str(events[0]["id"]) if events else "",
        checks_pass=bool(checks) and all(check.get("status") == "passing" for check in checks),
        host_ok=stored.get("host_status", "ok") == "ok",
        memory_mb=int((config.get("guest") or {}).get("memory_mb") or 0),
        keeps_disk=bool(config.get("mounts")) or persist == "always",
    )


def text_in(stored: Any, name: str) -> str:
    """A name such as may go into a path; raises KeyError, TypeError or ValueError."""
    value: str = stored[name]
    if not re.fullmatch("[A-Za-z0-9_-]+", value):
        raise ValueError(f"no {name}")
    return value


def never(error: UpstreamError) -> bool:
    """For calls that the caller repeats, if anybody does."""
    return False


def is_passing(error: UpstreamError) -> bool:
    """A region that is full is not asked again."""
    return is_unavailable(error) and error.code != NO_CAPACITY


# A 401 or 403 to these refuses our token; to others an app may not be visible yet.
TOKEN_CALLS = {"create app", "delete app", "list apps", "list org machines", "read token"}


class FlyClient:
    """The Machines API, a method a verb; every request goes through `_call`."""

    def __init__(self, api: Upstream, settings: FlySettings, *, budget_s: float) -> None:
        """`budget_s`: how long calls are tried again, the whole of a provisioning."""
        self.api = api
        self._org, self._url = settings.org, settings.api_url + "/v1"
        self._clock = api.clock
        self._headers = {"Authorization": fly_authorization(settings.token)}
        self._credentials = re.split("[ ,]", self._headers["Authorization"])[1:]
        self.backoff = Backoff(attempts=5, base_s=0.5, cap_s=8, budget_s=budget_s)
        self.trouble = ""
        self._refusal_logged_at = NEVER
        self._free_at = Recent[float](10_000)  # by action, and app or machine

    async def _call(
        self,
        method: str,
        path: str,
        action: str,
        parse: Callable[[Any], T] = bool,  # type: ignore[assignment]
        *,
        when: Callable[[UpstreamError], bool] = is_passing,
        find: Callable[[], Awaitable[T | None]] | None = None,
        timeout_s: float = 30,
        hide: Iterable[str] = (),
        **sent: Any,
    ) -> T:
        """What `parse` reads in the answer; `when` and `find` are those of `retry`.

        Raises UpstreamError.
        """
        whose = "/".join(path.split("/")[:5])  # /apps/A, /apps/A/machines/M
        sent |= {"hide": (*self._credentials, *hide), "headers": self._headers}

        async def attempt() -> T:
            await self._keep_pace(action, whose)
            url = URL(self._url + path)
            try:
                answer = await self.api.ask(action, method, url, timeout_s=timeout_s, **sent)
            except UpstreamError as error:
                self._note_refusal(error)
                raise
            self.trouble = ""
            try:
                return parse(answer)
            except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
                reason = f"an answer that makes no sense ({type(error).__name__})"
                raise UpstreamUnreadable("fly", action, reason, may_have_happened=True) from error

        return await retry(attempt, self.backoff, self._clock, when=when, find=find, path=whose)

    async def _keep_pace(self, action: str, whose: str) -> None:
        """Keep under Fly's rate limits, which are per action and app or machine."""
        # A second, and in a burst.
        rate, burst = (5, 10) if action == "get machine" else (1, 3)
        now, key = self._clock.monotonic(), f"{action} {whose}"
        free_at = max(self._free_at.get(key, now), now)
        self._free_at.put(key, free_at + 1 / rate, now)
        pause_s = free_at - now - (burst - 1) / rate
        if pause_s > 0:
            # The margin covers a clock that runs a little apart from Fly's.
            await self._clock.sleep(pause_s + 0.02)

    def _note_refusal(self, error: UpstreamError) -> None:
        """/health tells of a token that Fly refuses, and one log line a minute."""
        is_refusal = error.status in (401, 403) and error.code != NO_CAPACITY
        if not is_refusal or error.operation not in TOKEN_CALLS:
            return
        remedy = f"set FLY_API_TOKEN to an organisation token of {self._org}"
        self.trouble = f"Fly refuses our token ({error.status} to {error.operation}): {remedy}"
        now = self._clock.monotonic()
        if now - self._refusal_logged_at >= 60:
            self._refusal_logged_at = now
            log_error("fly_refuses_us", error=self.trouble)

    async def _make_once(
        self,
        path: str,
        action: str,
        body: Json,
        parse: Callable[[Any], T],
        listing: str,
        is_ours: Callable[[Any], bool],
    ) -> T:
        """POST exactly once what has no idempotency key.

        After an unknown outcome a GET of the same path (`listing`) may show what `is_ours`.
        """

        def pick(answer: Any) -> T | None:
            entries = answer if isinstance(answer, list) else answer.get("ips", [answer])
            return next((parse(entry) for entry in entries if is_ours(entry)), None)

        async def look() -> T | None:
            await self._clock.sleep(1.2)  # lists lag behind writes
            return await self._call("GET", path, listing, pick)

        more: Json = {"json": body, "timeout_s": 90, "find": look}
        return await self._call("POST", path, action, parse, **more)

    # Apps

    async def create_app(self, app: str) -> None:
        """Create the app on a network of its name; ours of that name counts.

        Raises NameTaken.
        """
        cookies = self.api.session.cookie_jar
        # Without its own a fresh app is only seen later.
        if len(cookies) > COOKIES_KEPT:
            cookies.clear()
        # `wait` is what Fly's own client sends; a repeated create answers 422 name_taken.
        body = {"name": app, "org_slug": self._org, "network": app}
        more: Json = {"params": {"wait": "true"}, "timeout_s": 60}
        try:
            await self._call("POST", "/apps", "create app", json=body, **more)
        except UpstreamRejected as error:
            is_taken = error.code == "name_taken" or "already been taken" in error.detail.lower()
            if not is_taken and error.status != 409:
                raise
            if not await self._is_ours(app):
                reason = f"the name {app} is taken by somebody else"
                raise NameTaken("fly", "create app", reason) from error
            log_event("app_adopted", vm_id=app)

    async def _is_ours(self, app: str) -> bool:
        """Made by a call whose answer was lost, it may not be visible yet."""

        def may_appear(error: UpstreamError) -> bool:
            return is_unavailable(error) or error.status == 404

        try:
            found = await retry(
                lambda: self.get_app(app), FRESH_APP, self._clock, when=may_appear
            )
        except UpstreamRejected as error:
            if error.status == 404:
                raise
            return False
        org = object_in(found.get("organization")).get("slug") or self._org
        return org == self._org and (found.get("network") or app) == app

    async def list_apps(self) -> set[str]:
        """The names of the organisation's apps."""

        def names(answer: Any) -> set[str]:
            return {str(app["name"]) for app in answer["apps"]}

        return await self._call(
            "GET", "/apps", "list apps", names, params={"org_slug": self._org}
        )

    async def get_app(self, app: str) -> Json:
        """One attempt; raises UpstreamNotFound when there is none."""
        # Of what is no object a TypeError.
        call = "GET", f"/apps/{app}", "get app", lambda found: {**found}
        return await self._call(*call, when=never)

    async def delete_app(self, app: str) -> bool:
        """Ask for the app to be deleted with all in it; False when Fly knows none."""
        more: Json = {"params": {"force": "true"}, "timeout_s": 60}
        try:
            with suppress(UpstreamUnreadable):
                await self._call("DELETE", f"/apps/{app}", "delete app", **more)
        except UpstreamNotFound:
            return False
        return True

    # Secrets, addresses, volumes

    async def set_secrets(self, app: str, values: Mapping[str, str]) -> int:
        """Set these in one call, leave others; returns the secrets' version."""
        call = (
            "POST",
            f"/apps/{app}/secrets",
            "set secrets",
            lambda answer: int(answer["version"]),
        )
        return await self._call(*call, json={"values": dict(values)}, hide=values.values())

    async def ensure_address(self, app: str, kind: str, network: str = "") -> None:
        """Allocate an address of this kind: `private_v6`, `shared_v4`, `v6`."""
        body = {"type": kind} | ({"network": network} if network else {})

        def is_there(address: Json) -> bool:
            # Fly does not reliably tell a type (fly-go, IsFlycast).
            ip = str(address["ip"])
            if ip.startswith("fdaa:"):
                return kind == "private_v6"
            return kind == ("v6" if ":" in ip else "shared_v4")

        call = f"/apps/{app}/ip_assignments", "allocate address", body, bool
        await self._make_once(*call, "list addresses", is_there)

    async def ensure_volume(
        self, app: str, region: str, size_gb: int, guest: Json
    ) -> tuple[str, str]:
        """Create one for /data, beside room for `guest`; returns its id and region."""
        body = {"name": "data", "region": region, "size_gb": size_gb, "compute": guest}

        def volume(answer: Any) -> tuple[str, str]:
            return text_in(answer, "id"), str(answer.get("region") or region)

        def is_ours(listed: Json) -> bool:
            names = listed.get("name"), listed.get("region")
            return names == ("data", region) and "destroy" not in str(listed.get("state"))

        call = f"/apps/{app}/volumes", "create volume", body, volume
        return await self._make_once(*call, "list volumes", is_ours)

    async def delete_volume(self, app: str, volume_id: str) -> None:
        """Delete a volume; none being there is success."""
        with suppress(UpstreamNotFound):
            await self._call("DELETE", f"/apps/{app}/volumes/{volume_id}", "delete volume")

    # Machines

    async def create_machine(self, app: str, request: Json, launch_id: str) -> Machine:
        """Create a machine; after an unknown outcome `launch_id` finds it."""

        def is_ours(listed: Json) -> bool:
            return parse_machine(listed).metadata.get("cockpit_launch") == launch_id

        call = f"/apps/{app}/machines", "create machine", request, parse_machine
        return await self._make_once(*call, "list machines", is_ours)

    async def list_org_machines(self) -> tuple[list[Machine], list[str]]:
        """The organisation's machines, and the regions that Fly could not ask."""
        machines: list[Machine] = []
        missing: set[str] = set()
        cursors: list[str] = []
        query = {"limit": "1000"}

        def page(answer: Any) -> str:
            machines.extend([parse_machine(entry) for entry in answer["machines"]])
            missing.update(map(str, answer.get("error_regions") or ()))
            return str(answer.get("next_cursor") or "")

        call = "GET", f"/orgs/{self._org}/machines", "list org machines", page
        # A page may be short, or even empty, while more follow.
        while "" not in cursors:
            cursors.append(await self._call(*call, params=query, timeout_s=60))
            query["cursor"] = cursors[-1]
            if len(set(cursors)) < len(cursors):
                raise UpstreamUnreadable("fly", call[2], "a list in circles")
        return machines, sorted(missing)

    async def get_machine(self, app: str, machine_id: str) -> Machine:
        path = f"/apps/{app}/machines/{machine_id}"
        return replace(await self._call("GET", path, "get machine", parse_machine), app=app)

    async def start_machine(self, app: str, machine_id: str) -> None:
        """One attempt: the state is read again before another."""
        path = f"/apps/{app}/machines/{machine_id}/start"
        await self._call("POST", path, "start machine", when=never)

    async def suspend_machine(self, app: str, machine_id: str) -> None:
        """One attempt; Fly answers before the machine is frozen."""
        path = f"/apps/{app}/machines/{machine_id}/suspend"
        await self._call("POST", path, "suspend machine", when=never)

    async def restart_machine(self, app: str, machine: Machine) -> None:
        """Restart a machine, or start it when it rests."""
        if machine.state in RESTING:
            await self.start_machine(app, machine.id)
            return
        path = f"/apps/{app}/machines/{machine.id}/restart"
        more: Json = {"params": {"timeout": "30s"}, "timeout_s": 90, "when": is_surely_undone}
        await self._call("POST", path, "restart machine", **more)

    async def update_machine(
        self, app: str, machine: Machine, config: Json, secrets_version: int
    ) -> Machine:
        """Replace the config, which restarts it; a new version is ours, whatever was heard."""
        body: Json = {"config": config, "min_secrets_version": secrets_version}
        if machine.instance_id:
            body["current_version"] = machine.instance_id

        def is_new(present: Json) -> bool:
            return parse_machine(present).instance_id != machine.instance_id

        call = f"/apps/{app}/machines/{machine.id}", "update machine", body, parse_machine
        return await self._make_once(*call, "get machine", is_new)

    async def set_metadata(self, app: str, machine_id: str, name: str, value: str) -> None:
        """Set one entry of a machine's metadata; the machine is not restarted."""
        path = f"/apps/{app}/machines/{machine_id}/metadata/{name}"
        await self._call("POST", path, "set metadata", json={"value": value})

    async def is_started(self, app: str, machine_id: str, **wanted: str) -> bool:
        """Wait for `started`, of `version` or after `from_event_id`; False after 60 s.

        `state`: for another one.
        """
        given = {name: value for name, value in wanted.items() if value}
        query = {"state": "started", "timeout": "60", **given}

        def is_worth_it(error: UpstreamError) -> bool:
            # Of one that ran out the caller looks at the machine first.
            return is_passing(error) and error.status != 408

        call = "GET", f"/apps/{app}/machines/{machine_id}/wait", "wait for machine"
        try:
            await self._call(*call, params=query, timeout_s=75, when=is_worth_it)
        except UpstreamUnavailable as error:
            if error.status != 408:
                raise
            return False
        return True

    async def read_token(self) -> list[Json]:
        """What Fly says of the token in use."""
        call = "GET", "/tokens/current", "read token", dict[str, Any]
        return list((await self._call(*call, when=never)).get("tokens") or [])


# --- Twilio ---
#
# Facts: Twilio's OpenAPI document (twilio_api_v2010), its pages on webhook security and on error codes.

EMPTY_TWIML = '<?xml version="1.0" encoding="UTF-8"?><Response/>'
# Twilio's limit on Body (21617); emoji count as two, so UTF-16 units are counted.
PART_UNITS = 1600
MAX_PARTS = 8  # well under the 15 quick replies after which Twilio's loop guard (14107) steps in
SIGNATURE_DIGESTS = {"HMAC_SHA1": "sha1", "HMAC_SHA256": "sha256"}
TERMINAL_STRING = r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x9c|\x1b\\)?"
TERMINAL_CONTROL = re.compile(
    TERMINAL_STRING + r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]"
)
UNSENDABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# What SmartEncoded swaps for GSM-7 characters (Twilio's segment calculator): for comparing what was
# sent with what Twilio lists.
SMART_QUOTES = "\u00ab\u00bb\u201c\u201d\u02ba\u02ee\u201f\u275d\u275e\u301d\u301e\uff02"
SMART_APOSTROPHES = (
    "\u2018\u2019\u02bb\u02c8\u02bc\u02bd\u02b9\u201b\uff07\u00b4\u02ca\u0060\u02cb"
    "\u275b\u275c\u0313\u0314\ufe10\ufe11"
)
SMART_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u02d7"
SMART_BLANKS = (
    "\t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u202f\u205f\u3000"
)
SMART_ENCODING = str.maketrans(
    {
        **dict.fromkeys(SMART_QUOTES, '"'),
        **dict.fromkeys(SMART_APOSTROPHES, "'"),
        **dict.fromkeys(SMART_DASHES, "-"),
        **dict.fromkeys(SMART_BLANKS, " "),
        **dict.fromkeys("\u200b\u2060\ufeff", ""),
        "\u2026": "...",
    }
)


def twilio_signature(
    token: str, url: str, pairs: Iterable[tuple[str, str]], algorithm: str = "HMAC_SHA1"
) -> str:
    """base64 HMAC of the URL and the form's decoded fields, sorted, each distinct one once."""
    text = url + "".join(name + value for name, value in sorted(set(pairs)))
    digest = hmac.digest(token.encode(), text.encode(), SIGNATURE_DIGESTS[algorithm])
    return base64.b64encode(digest).decode()


@functools.lru_cache(100)
def signed_urls(url: str) -> tuple[str, ...]:
    """The forms of a webhook's URL that Twilio may have signed: without its port, and with it."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    bare = host.removesuffix(f":{parts.port}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    rest = url.split("://", 1)[1][len(parts.netloc) :].split("#", 1)[0]
    return f"{parts.scheme}://{bare}{rest}", f"{parts.scheme}://{bare}:{port}{rest}"


def is_signed(
    token: str,
    url: str,
    pairs: Sequence[tuple[str, str]],
    header: str | None,
    *,
    body: bytes | None = None,
    algorithm: str = "HMAC_SHA1",
) -> bool:
    """Whether Twilio signed this webhook; `body` is that of a JSON webhook, whose SHA-256 is in the URL."""
    if not header or algorithm not in SIGNATURE_DIGESTS:
        return False
    if body is not None:
        query = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
        digest = hashlib.sha256(body).hexdigest()
        if not hmac.compare_digest(digest.encode(), query.get("bodySHA256", "").encode()):
            return False
    given = header.encode("utf-8", "surrogateescape")
    signatures = (twilio_signature(token, form, pairs, algorithm) for form in signed_urls(url))
    return any(hmac.compare_digest(one.encode(), given) for one in signatures)


def parse_form(raw: bytes) -> list[tuple[str, str]]:
    """A form's decoded fields in order, blank ones kept; raises ValueError."""
    text = raw.decode()
    if text.count("&") > 1000:
        raise ValueError("over 1000 fields")
    # Read as a query: several times faster than by urllib.
    return list(URL.build(query_string=text, encoded=True).query.items())


def parse_inbound(pairs: Sequence[tuple[str, str]], arrived: float) -> InboundMessage:
    """A webhook's form as a message; raises Refusal when it has no MessageSid."""
    form = dict(reversed(pairs))
    sid = form.get("MessageSid", "")
    if not sid:
        raise Refusal("malformed", "MessageSid is missing")
    media = []
    for n in range(10) if form.get("NumMedia", "0") != "0" else ():
        if url := form.get(f"MediaUrl{n}"):
            media.append((url, form.get(f"MediaContentType{n}", "")))
    return InboundMessage(
        sid=sid,
        sender=form.get("From", ""),
        recipient=form.get("To", ""),
        body=form.get("Body", ""),
        arrived=arrived,
        media=tuple(media),
        opt_out=form.get("OptOutType", ""),
    )


MESSAGE_SID = re.compile("(SM|MM)[0-9a-f]{32}")


def twiml(message: str = "") -> str:
    """A TwiML document that texts `message` back, or nothing."""
    if not message:
        return EMPTY_TWIML
    content = f"<Response><Message>{escape(clean_text(message))}</Message></Response>"
    return EMPTY_TWIML.replace("<Response/>", content)


def clean_text(text: str) -> str:
    """Text without terminal control sequences and without what XML or SMS cannot carry."""
    if not UNSENDABLE.search(text):
        return text
    text = TERMINAL_CONTROL.sub("", text)
    return UNSENDABLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def utf16_units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def cut_within(text: str, start: int, units: int) -> int:
    """Where to cut `text[start:]` to fit: behind a line end, else a word, else anywhere."""
    end = min(len(text), start + units)
    while (excess := utf16_units(text[start:end]) - units) > 0:
        end -= (excess + 1) // 2
    if end == len(text):
        return end
    half = start + (end - start) // 2
    for mark in ("\n", " "):
        found = text.rfind(mark, half, end)
        if found >= 0:
            return found + 1
    return end


def split_text(text: str) -> list[str]:
    """Parts of at most 1,600 UTF-16 units, numbered `(1/3) `; the eighth says what is left out."""
    if len(text) <= PART_UNITS and utf16_units(text) <= PART_UNITS:
        return [text]
    parts: list[str] = []
    start = 0
    room = PART_UNITS - len("(1/8) ")
    while start < len(text) and len(parts) < MAX_PARTS:
        end = cut_within(text, start, room)
        parts.append(text[start:end])
        start = end
    if start < len(text):
        start -= len(parts[-1])
        end = cut_within(text, start, room - len(f"[{len(text)} characters left out]"))
        parts[-1] = f"{text[start:end]}[{len(text) - end} characters left out]"
    return [f"({number}/{len(parts)}) {part}" for number, part in enumerate(parts, 1)]


class ErrorPolicy(NamedTuple):
    """What one of Twilio's codes means for a message of ours, and what to say of it.

    `retry`: tried again, for at most an hour; `retry_and_alert`: the same, and /health says so;
    `check_then_resend`: it may have been sent, Twilio's list is looked at before; `as_link`: a picture
    goes as words and a link; `opted_out`: nothing more until START; `final`: this message is given up.
    """

    action: str
    text: str


# Every code of Twilio's dictionary (www.twilio.com/docs/api/errors) that a message of ours can meet, in
# the create's answer or in a callback: action, codes, words.
ERROR_TABLE = """
retry_and_alert 20003: Twilio refuses our credentials; check TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN
retry_and_alert 30002: the Twilio account is suspended; settle it in Twilio's console
retry 20429 20503: Twilio is busy; tried again
retry 21611: this sender's queue at Twilio is full; tried again later
check_then_resend 20500: Twilio failed inside; looked up before it is sent again
as_link 21612 21620 21670 30011 30019 11200 11751 12300: it could not be sent as a picture message
opted_out 21610: the owner opted out by STOP; nothing is sent until they text START
final 14107: Twilio's loop guard stopped it (over 15 quick texts between two numbers); text less often
final 30001 30017 30022 63018: Twilio or the carrier was congested; ask the VM again
final 30008: lost for a reason the carrier does not tell; ask the VM again
final 30004: the phone blocks us, or its owner opted out; they may text START
final 20404: Twilio knows no such account; check TWILIO_ACCOUNT_SID, letter by letter
final 21211: Twilio says that this is not a phone number; provision the VM with the right one
final 21266: the number is the gateway's own; provision the VM with the engineer's
final 21212 21606: our number is not this account's or cannot send this; check TWILIO_PHONE_NUMBER
final 21701 21702 21703 21704 21705: the Messaging Service is wrong or has no number; mend it at Twilio
final 21408: texts to this country are not enabled; allow it under Geo Permissions in Twilio's console
final 21602 21603 21604 21609 21617 21623 21624: Twilio found it malformed; a fault of cockpit or PUBLIC_URL
final 21608: a trial account sends to verified numbers only; verify this one or upgrade the Twilio account
final 21614 21635 30006: a landline, or out of reach; provision the VM with a mobile number
final 30003: the phone was off or out of reach
final 30005: the carrier does not know this number; check it
final 30007: filtered as spam by Twilio or the carrier; see the message in Twilio's console, do not repeat it
final 30410: the carrier did not answer in time; it may have arrived
final 30023 30027: T-Mobile's daily limit is used up until midnight Pacific time; raise the trust score
final 30032: the toll-free number is not verified; verify it in Twilio's console
final 30034 30035: the number is not registered for texts in the US (A2P 10DLC); register it at Twilio
final 30036: it waited too long in Twilio's queue
final 30450: Twilio's SMS pumping protection blocked it; look into it before texting on
final 63016: WhatsApp allows answers only within 24 h of the owner's last text; they should text first
"""


def parse_error_table(table: str) -> dict[str, ErrorPolicy]:
    policies: dict[str, ErrorPolicy] = {}
    for line in table.strip().splitlines():
        head, _, text = line.partition(": ")
        action, *codes = head.split()
        policies |= dict.fromkeys(codes, ErrorPolicy(action, text))
    return policies


TWILIO_ERRORS = parse_error_table(ERROR_TABLE)


def explain_code(code: str) -> str:
    """One of Twilio's codes in plain words, with the cure."""
    policy = TWILIO_ERRORS.get(code)
    return f"Twilio {code}: {policy.text if policy else f'see www.twilio.com/docs/api/errors/{code}'}"


def action_for(error: UpstreamError) -> str:
    """What to do about a failed call: by its code; a code nobody knows, by what is known of the call."""
    if error.code in TWILIO_ERRORS:
        return TWILIO_ERRORS[error.code].action
    if is_unavailable(error):
        return "check_then_resend" if error.may_have_happened else "retry"
    return "retry_and_alert" if error.status == 401 else "final"


def explain_twilio(raw: bytes) -> tuple[str, str]:
    """Twilio's words and numeric code."""
    body = object_in(parse_json(raw))
    code = str(body.get("code") or "")
    words = body.get("message") or raw[:2000].decode("utf-8", "replace")
    return f"{code} {words}".strip(), code


TWILIO = Dialect(
    service="twilio",
    request_id_header="Twilio-Request-Id",
    explain=explain_twilio,
    # A 4xx and a 503 were not processed; what came of another 5xx is unknown.
    is_unprocessed=lambda status: status < 500 or status == 503,
)


class Sms(NamedTuple):
    """One message to hand to Twilio: words, or the address of a picture."""

    sender: str
    recipient: str
    body: str
    media: str = ""
    callback: str = ""  # where Twilio reports what became of it

    def form(self) -> bytes:
        form = {"From": self.sender, "To": self.recipient, "Body": self.body}
        form |= {"MediaUrl": self.media, "StatusCallback": self.callback}
        fields = {name: value for name, value in form.items() if value}
        # A query is written as a form is, and several times faster than by urllib.
        return URL.build(query={"SmartEncoded": "true", **fields}).raw_query_string.encode()


def comparable(body: str) -> str:
    """Words as they compare after SmartEncoded."""
    return " ".join(body.translate(SMART_ENCODING).split())


def listed_at(message: Json) -> float | None:
    """When Twilio made a message, by its clock."""
    created = parse_http_date(message.get("date_created"))
    return parse_http_date(message.get("date_sent")) if created is None else created


class TwilioClient:
    """Twilio's Messages resource: form-encoded, basic auth, and no idempotency key exists."""

    TIMEOUT_S = 30.0
    SENDING = Backoff(base_s=0.5, cap_s=60, budget_s=3600)

    def __init__(self, api: Upstream, settings: TwilioSettings) -> None:
        self.api = api
        self._settings = settings
        self._clock = api.clock
        account = f"{settings.api_url}/2010-04-01/Accounts/{settings.account_sid}"
        self._account = URL(account + ".json")
        self._messages = URL(account + "/Messages.json")
        self._numbers = URL(account + "/IncomingPhoneNumbers.json")
        user, secret = settings.api_key, settings.api_secret
        if not user:
            user, secret = settings.account_sid, settings.auth_tokens[0]
        authorization = basic_auth(user, secret)
        self._headers = {
            "Authorization": authorization,
            "Accept": "application/json",
            "Content-Type": "application/x-www-form-urlencoded",
        }
        self._credentials = (*settings.auth_tokens, secret, authorization.removeprefix("Basic "))
        # No look-up may take one of these for another.
        self.sent_sids: Recent[None] = Recent(10_000)
        self.cannot_list = False
        self.trouble = ""

    def now(self) -> float:
        """Our clock, corrected to Twilio's: whatever is compared with its dates is told by this."""
        return self._clock.now() - self.api.ahead_s

    async def _ask(self, operation: str, url: URL, *, method: str = "GET", **sent: Any) -> Json:
        """One request; raises UpstreamError."""
        sent |= {"timeout_s": self.TIMEOUT_S, "hide": self._credentials, "headers": self._headers}
        try:
            return object_in(await self.api.ask(operation, method, url, **sent))
        except UpstreamError as error:
            if error.status:
                is_code = re.fullmatch("[0-9]{1,5}", error.code)
                self.api.metrics.twilio_errors.add(error.code if is_code else "none")
            raise

    def note_sent(self, sid: str) -> None:
        self.sent_sids.put(sid, None, self._clock.monotonic())

    async def create(self, sms: Sms) -> str:
        """Hand one message to Twilio, one attempt; returns its SID, or nothing if that was unreadable."""
        more: Json = {"method": "POST", "data": sms.form()}
        try:
            sid = (await self._ask("create message", self._messages, **more)).get("sid")
        except UpstreamUnreadable:
            return ""
        if not isinstance(sid, str):
            return ""
        self.note_sent(sid)
        return sid

    async def deliver(
        self, sms: Sms, attempted_at: float | None, is_wanted: Callable[[], bool], **about: str
    ) -> str:
        """Hand one message to Twilio exactly once, trying for at most an hour; raises UpstreamError.

        `attempted_at` (Twilio's clock) is when it may have been sent: then the list is read first.
        The log tells by `about` which it is.
        """
        failures, began = 0, self._clock.monotonic()
        started_at: float | None = None  # by our clock: of an attempt whose outcome is unknown
        while True:
            attempt_at = self._clock.now()
            try:
                if attempted_at is not None or started_at is not None:
                    if sid := await self._find(sms, attempted_at, started_at):
                        return sid
                    attempted_at = started_at = None
                sid = await self.create(sms)
                self.trouble = ""
                return sid
            except UpstreamError as error:
                failures += 1
                action = action_for(error)
                pause_s = self._clock.uniform(0, self.SENDING.ceiling(failures))
                pause_s = max(pause_s, error.retry_after_s or 0)
                is_late = self._clock.monotonic() + pause_s - began > self.SENDING.budget_s
                if is_late or action not in ("retry", "retry_and_alert", "check_then_resend"):
                    raise
                if action == "retry_and_alert":
                    self.trouble = f"texts wait: {explain_code(error.code or '20003')}"
                if action == "check_then_resend" and error.operation == "create message":
                    started_at = attempt_at
                pause: Json = {"attempt": failures + 1, "pause_s": round(pause_s, 2)}
                log_warning("send_retry", **about, error=str(error), **pause)
                await self._clock.sleep(pause_s)
                if not is_wanted():
                    raise

    async def _find(self, sms: Sms, attempted_at: float | None, started_at: float | None) -> str:
        """The SID of a message with these words that Twilio took since the attempt, or nothing.

        `attempted_at`: by Twilio's clock; `started_at`: by ours, which the list's own Date corrects.
        """
        if self.cannot_list:
            return ""
        query = {"To": sms.recipient, "From": sms.sender}
        wanted = comparable(sms.body)
        try:
            async for message in self.list_messages(query, pages=10):
                earliest = attempted_at
                if earliest is None:
                    earliest = (started_at or 0) - self.api.ahead_s
                sid = str(message.get("sid") or "")
                is_same = comparable(str(message.get("body") or "")) == wanted
                is_young = (listed_at(message) or 0) >= int(earliest)
                if is_same and is_young and sid not in self.sent_sids:
                    self.note_sent(sid)
                    return sid
        except UpstreamRejected as error:
            if action_for(error) == "retry_and_alert":
                raise
            self.give_up_listing(error)
        return ""

    def give_up_listing(self, error: UpstreamRejected) -> None:
        """Say once that the list is refused; go on without it when that is for good."""
        # 20008: test credentials may only create. Then an unknown outcome is sent again rather than lost.
        if not self.cannot_list:
            log_warning("twilio_list_refused", error=str(error))
        self.cannot_list = error.code == "20008"

    def first_page(self, query: Mapping[str, str]) -> URL:
        """Where the list of messages matching `query` begins, the newest first."""
        return self._messages.with_query({**query, "PageSize": "1000"})

    async def list_page(self, url: URL) -> tuple[list[Json], URL | None]:
        """One page of messages, and where the next is; raises UpstreamError."""
        answer = await self._ask("list messages", url)
        if not isinstance(answer.get("messages"), list):
            raise UpstreamUnreadable("twilio", "list messages", "an answer without messages")
        uri, following = answer.get("next_page_uri"), None
        if isinstance(uri, str) and uri.startswith("/"):
            following = URL(self._settings.api_url + uri, encoded=True)
        return objects_in(answer["messages"]), following

    async def list_messages(self, query: Mapping[str, str], pages: int) -> AsyncIterator[Json]:
        """Messages matching `query`, over at most `pages` pages.

        Raises UpstreamError.
        """
        url: URL | None = self.first_page(query)
        while url is not None and pages > 0:
            messages, url = await self.list_page(url)
            for message in messages:
                yield message
            pages -= 1

    async def media_of(self, sid: str) -> tuple[tuple[str, str], ...]:
        """Addresses and types of the pictures of a message that Twilio has.

        Raises UpstreamError.
        """
        url = self._messages.parent / "Messages" / sid / "Media.json"
        media = []
        for entry in objects_in((await self._ask("list media", url)).get("media_list")):
            uri = str(entry.get("uri", ""))
            if uri.startswith("/"):
                address = self._settings.api_url + uri.removesuffix(".json")
                media.append((address, str(entry.get("content_type") or "")))
        return tuple(media)

    def media_path(self, url: str) -> str:
        """The path of a picture at Twilio's own address, or nothing."""
        for origin in (self._settings.api_url, "https://api.twilio.com"):
            if url.startswith(origin + "/"):
                return url.removeprefix(origin)
        return ""

    def is_media(self, path: str) -> bool:
        """Whether a path of Twilio's API is a picture of a message of our account."""
        account = re.escape(self._settings.account_sid)
        pattern = f"/2010-04-01/Accounts/{account}/Messages/[A-Za-z0-9]+/Media/[A-Za-z0-9]+"
        return re.fullmatch(pattern, path) is not None

    @contextlib.asynccontextmanager
    async def open_media(self, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """A picture that a phone sent.

        Our credentials go to Twilio itself, never where it redirects.
        """
        url = URL(self._settings.api_url + path, encoded=True)
        headers = {"Authorization": self._headers["Authorization"]}
        for _ in range(5):
            async with self.api.session.get(
                url, headers=headers, allow_redirects=False, timeout=MEDIA_TIMEOUT
            ) as response:
                location = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or location is None:
                    yield response
                    return
                url = url.join(URL(location))
                headers = {}
        raise Refusal("not_found", "the picture is not to be had: Twilio redirects too often")

    async def read_account(self) -> Json:
        """The account as Twilio knows it."""
        return await self._ask("read account", self._account)

    async def find_number(self, phone: str) -> Json | None:
        """The account's phone number of this name, with where its texts go."""
        answer = await self._ask("find number", self._numbers.with_query({"PhoneNumber": phone}))
        numbers = objects_in(answer.get("incoming_phone_numbers"))
        return next((one for one in numbers if one.get("phone_number") == phone), None)


MEDIA_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)


# --- The VM ---

MAX_ANSWER_BYTES = 1024 * 1024
MAX_IMAGE_BYTES = 5 * 1024 * 1024
MAX_HEAD_BYTES = 512 * 1024  # with what a transport reads ahead
MAX_IMAGES = 10
IMAGE_PATH = re.compile(r"/images/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
PICTURES = {  # by their first bytes
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
}
NOTE_CHARACTERS = 100
# ValueError: a URL that is none; routes.json can be written by hand.
UNREACHED = (aiohttp.ClientError, OSError, ValueError)


class MeteredSocket(socket.socket):
    """Ends a connection that brings more than any answer may: bodies, heads and `100 Continue` included."""

    left = MAX_IMAGE_BYTES + MAX_HEAD_BYTES

    def recv(self, size: int, flags: int = 0) -> bytes:
        received = super().recv(size, flags)
        self.count(len(received))
        return received

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:  # under TLS
        received = super().recv_into(buffer, nbytes, flags)
        self.count(received)
        return received

    def count(self, received: int) -> None:
        self.left -= received
        if self.left < 0:
            raise ConnectionAbortedError(errno.ECONNABORTED, "more than an answer may be")


def metered_socket(address: tuple[Any, ...]) -> socket.socket:
    return MeteredSocket(*address[:3])


class Answer(NamedTuple):
    """What a VM said to a command, as far as it could be understood."""

    text: str = ""
    exit_code: int = 0
    images: tuple[str, ...] = ()
    is_unreadable: bool = False


def parse_answer(raw: bytes) -> Answer:
    """What a VM's answer says, whatever its shape."""
    body = parse_json(raw)
    if not isinstance(body, dict) or not isinstance(text := body.get("text") or "", str):
        return Answer(is_unreadable=True)
    text, code = clean_text(text).rstrip("\n"), body.get("exitCode")
    listed = body.get("images")
    urls = [str(image.get("url")) for image in objects_in(listed)]
    images = tuple(filter(IMAGE_PATH.fullmatch, urls))[:MAX_IMAGES]
    is_unreadable = bool(listed) and not images and not text.strip()
    code = code if type(code) is int and abs(code) < 2**32 else 0
    return Answer(text, code, images, is_unreadable)


def kind_of_picture(start: bytes) -> str:
    """The media type that a file's first bytes tell, nothing when it is no picture."""
    return next((kind for magic, kind in PICTURES.items() if start.startswith(magic)), "")


class Health(NamedTuple):
    """What a VM's `/health` said.

    `note`: a line of what it is doing, or of what it lacks.
    """

    is_well: bool = False
    is_busy: bool = False
    note: str = ""


# To take an address apart costs as much as to sign a text.
@functools.lru_cache(4000)
def vm_address(vm_url: str, path: str) -> URL:
    """Raises ValueError."""
    return URL(vm_url + path)


@dataclass(eq=False)
class VmClient:
    """Speaks to VMs, which run their owners' code and are not trusted: no cookies, no redirects.

    Its session makes a new connection for each call: a kept one is only something to flood.
    """

    session: aiohttp.ClientSession
    keyring: Keyring
    clock: Clock
    command_timeout_s: float

    HEALTH_S = 5.0
    CANCEL_S = 30.0

    def _headers(self, route: Route) -> dict[str, str]:
        token = self.keyring.vm_token(route.vm_id, route.key_id)
        # What is packed may unfold to any size.
        return {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}

    async def _ask(
        self,
        route: Route,
        method: str,
        path: str,
        timeout_s: float,
        sid: str | None = None,
        body: Json | None = None,
    ) -> tuple[int, bytes]:
        """Status and body (empty when it is too long), one attempt; raises UNREACHED."""
        headers = self._headers(route) | ({} if sid is None else {"Idempotency-Key": sid})
        sent: Json = {"json": body, "headers": headers, "timeout": CONNECT_TIMEOUT}
        url = vm_address(route.vm_url, path)
        request = self.session.request(method, url, allow_redirects=False, **sent)
        async with self.clock.time_limit(timeout_s), request as response:
            return response.status, await read_at_most(response, MAX_ANSWER_BYTES) or b""

    async def is_healthy(self, route: Route) -> bool:
        """Whether `/health` answers 2xx, one attempt of at most 5 s."""
        return (await self.health(route)).is_well

    async def health(self, route: Route, timeout_s: float = HEALTH_S) -> Health:
        """What `/health` says, one attempt."""
        try:
            status, raw = await self._ask(route, "GET", "/health", timeout_s)
        except UNREACHED:
            return Health()
        body = object_in(parse_json(raw))
        note = redact(clean_text(str(body.get("note") or "")))[:NOTE_CHARACTERS]
        return Health(status < 300, body.get("busy") is True, note)

    async def cancel(self, route: Route, sid: str) -> bool | None:
        """End the VM's command, the one of this SID if there is one.

        Whether it had any; None when it does not tell. Raises VmAway and VmFailed.
        """
        try:
            status, raw = await self._ask(route, "POST", "/cancel", self.CANCEL_S, sid)
        except UNREACHED as error:
            raise VmAway(f"not cancelled ({type(error).__name__})") from error
        if status >= 300:
            raise VmFailed(status)
        stopped = object_in(parse_json(raw)).get("stopped")
        return stopped if isinstance(stopped, bool) else None

    def open_image(
        self, route: Route, path: str
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """One of a VM's images, not yet read."""
        sent: Json = {"headers": self._headers(route), "timeout": MEDIA_TIMEOUT}
        return self.session.get(route.vm_url + path, allow_redirects=False, **sent)

    async def command(self, route: Route, sid: str, body: Json) -> Answer:
        """Run one text; its Idempotency-Key is its SID.

        Raises VmAway, VmBusy, VmSilent or VmFailed.
        """
        limit_s = self.command_timeout_s
        try:
            status, raw = await self._ask(route, "POST", "/command", limit_s, sid, body)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise VmAway(f"not reached ({type(error).__name__})") from error
        except TimeoutError as error:
            raise VmSilent from error
        except aiohttp.ClientResponseError:  # not HTTP at all
            return Answer(is_unreadable=True)
        except (aiohttp.ClientError, ValueError) as error:
            reason = f"connection dropped ({type(error).__name__})"
            raise VmAway(reason, may_have_reached=True, is_drop=True) from error
        if status < 300:
            return parse_answer(raw)
        if status in (502, 503, 504):
            is_drop = status == 504
            reason = f"answered {status}"
            raise VmAway(reason, may_have_reached=status != 503, is_drop=is_drop)
        raise VmBusy if status == 409 else VmFailed(status)


# --- Agents ---
#
# What runs on a VM: the server of the contract, its agent, and `say`.

OUTPUT_BYTES = 128 * 1024  # JSON may make six of one; a phone reads far less
ERRORS_CHARACTERS = 2000
CANCELLED = 130
INBOX_TIMEOUT = aiohttp.ClientTimeout(total=20)
CLONE_S = 240.0
SAID = "said-"  # so begin the names of pictures that `say` sent
BUILT_IN = r"""
said=$(cat)
set -f
set -- $(printf %s "$said" | tr A-Z a-z)
case "$# $*" in
"1 crash") kill -9 $PPID ;;
"1 image") mkdir -p images; base64 -d > images/$$.png <<'END' && echo "Here is an image." ;;
iVBORw0KGgoAAAANSUhEUgAAACAAAAAUAgMAAACR/9fcAAAA
DFBMVEUdTthgpfr94EcWo0qd9R7xAAAARklEQVR42mNgIAC0
FkAZq1ZgY4SCwKqVoWiMrKVQBhAgMeL/Qhjh//9/BTPq////
D2YA6f9XYQygqngw4//X8P8QBhDAGQDWyUOQrvOoPAAAAABJ
RU5ErkJggg==
END
"2 sleep "[0-9]*) sleep "$2" && echo "Slept $2 s." ;;
*) printf %s "$said" ;;
esac
"""
PRESETS = {  # what is in brackets resumes the last conversation
    "claude": "claude -p [--continue] --dangerously-skip-permissions",
    "codex": "codex exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "
    "[resume --last] -",
    "gemini": "gemini [--resume latest] --approval-mode yolo --skip-trust",
    "opencode": "opencode run [--continue] --auto",
}
PLAIN = re.compile(r"[\w\s./:@%,+-]+")  # what a shell takes as it stands
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# It answers GitHub alone; the token itself is in no argument, URL or file.
ASKPASS = """#!/bin/sh
case "$1" in
"Username for 'https://github.com'"*) echo x-access-token ;;
"Password for 'https://x-access-token@github.com'"*) echo "$GITHUB_TOKEN" ;;
*) exit 1 ;;
esac
"""
Shown = tuple[int, int, str]  # when it was changed, its size, its name


@contextlib.contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    """A handle of a folder, made if need be, never of a link's (blocking)."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


def read_picture(path: Path) -> bytes:
    """The bytes of a picture of at most 5 MB, else none (blocking). Raises OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_IMAGE_BYTES + 1)
    return content if kind_of_picture(content) and len(content) <= MAX_IMAGE_BYTES else b""


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def keep(folder: Path, start: str, content: bytes, kind: str = "") -> Path:
    """Write a new file, not into a folder that is a link (blocking).

    Raises OSError and StoreError.
    """
    suffix = mimetypes.guess_extension(kind_of_picture(content) or kind) or ".bin"
    file = folder / (start + secrets.token_hex(8) + suffix)
    with opened_folder(folder):
        write_atomically(file, [content])
    return file


def shown_in(images: Path) -> set[Shown]:
    """The files that may be pictures to be sent, no links (blocking)."""
    found = set()
    with suppress(OSError), opened_folder(images) as folder:
        for entry in os.scandir(folder):
            is_ours = entry.is_file(follow_symlinks=False)
            if is_ours and IMAGE_PATH.fullmatch(f"/images/{entry.name}"):
                status = entry.stat(follow_symlinks=False)
                found.add((status.st_mtime_ns, status.st_size, entry.name))
    return found


def shown_since(images: Path, before: set[Shown]) -> list[Json]:
    """Ten pictures that appeared, oldest first, but none that `say` sent (blocking)."""
    appeared, found = shown_in(images) - before, []
    said = {name.removeprefix(SAID)[:16] for _, _, name in appeared if name.startswith(SAID)}
    for _, _, name in sorted(appeared):
        with suppress(OSError):
            content = read_picture(images / name)
            if content and digest_of(content) not in said:
                found.append({"type": kind_of_picture(content), "url": f"/images/{name}"})
        if len(found) == MAX_IMAGES:
            break
    return found


async def fetch_picture(session: aiohttp.ClientSession, inbox: Path, media: Json) -> str:
    """The name of the file that a phone's picture becomes, for the agent."""
    with suppress(aiohttp.ClientError, OSError, ValueError, StoreError):
        async with session.get(str(media.get("url")), allow_redirects=False) as response:
            content = await read_at_most(response, MAX_IMAGE_BYTES)
        if response.status == 200 and content is not None:
            kind = str(media.get("content_type"))
            file = await asyncio.to_thread(keep, inbox, "", content, kind)
            return f"{inbox.name}/{file.name}"
    return "(a picture that could not be fetched)"


class Agent:
    """A preset or any command, run for each text in a process group of its own.

    The text is its standard input, the answer its standard output; standard error is shown
    when it says nothing else or fails. COCKPIT_NEW=1 asks for a fresh conversation.
    """

    def __init__(self, command: str, folder: Path) -> None:
        self._command = command.strip() or BUILT_IN
        self._folder = folder
        self._groups: set[int] = set()  # of its commands, also of those that ended
        self._said: Sequence[IO[bytes]] = ()  # output and errors of the running one

    def trouble(self) -> str:
        """Why it cannot work, or nothing."""
        program = self._command.split()[0]
        if shutil.which(program) or not PLAIN.fullmatch(self._command):
            return ""
        return f"there is no {program} on this VM's PATH; install it or choose another --agent"

    async def run(self, text: str, *, is_new: bool = False) -> tuple[str, int]:
        """What it said and its exit code; cancelled it ends what it started."""
        arguments = ["sh", "-c", self._command]
        if preset := PRESETS.get(self._command):
            arguments = re.sub(r"\[.*\] " if is_new else r"[][]", "", preset).split()
        # Files, not pipes: what it leaves running may hold them open.
        try:
            with (
                tempfile.TemporaryFile() as given,
                tempfile.TemporaryFile("a+b") as output,
                tempfile.TemporaryFile("a+b") as errors,
            ):
                given.write(text.encode("utf-8", "replace"))
                given.seek(0)
                process = await asyncio.create_subprocess_exec(
                    *arguments,
                    cwd=self._folder,
                    env=os.environ | {"COCKPIT_NEW": "1" if is_new else ""},
                    stdin=given,
                    stdout=output,
                    stderr=errors,
                    process_group=0,
                )
                self._groups = self.left_running() | {process.pid}
                self._said = output, errors
                try:
                    code = await process.wait()
                except asyncio.CancelledError:
                    await end_group(process.pid)
                    code = CANCELLED
                said = os.pread(output.fileno(), OUTPUT_BYTES, 0).decode("utf-8", "replace")
                if code or not said.strip():
                    said = f"{said.rstrip()}\n{read_tail(errors)}".strip("\n")
                return said, code if code >= 0 else 128 - code
        except (OSError, ValueError) as error:
            return f"The agent could not be started: {error}", 127
        finally:
            self._said = ()

    def last_line(self) -> str:
        """The newest line of the running command."""
        if not self._said:
            return ""
        newest = max(self._said, key=lambda file: os.fstat(file.fileno()).st_mtime_ns)
        lines = [line for line in read_tail(newest).splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def left_running(self) -> set[int]:
        """The groups of processes that its commands left."""
        self._groups = {group for group in self._groups if signal_group(group, 0)}
        return self._groups

    def close(self) -> None:
        """End whatever runs, at once."""
        for group in self._groups:
            signal_group(group, signal.SIGKILL)


def read_tail(file: IO[bytes]) -> str:
    """The last characters of an open file."""
    size, handle = 4 * ERRORS_CHARACTERS, file.fileno()
    tail = os.pread(handle, size, max(0, os.fstat(handle).st_size - size))
    return tail.decode("utf-8", "replace")[-ERRORS_CHARACTERS:]


def signal_group(group: int, number: int) -> bool:
    """Signal a group of processes (0 only asks); whether any of it is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS refuses to signal what has ended
        return False
    return True


async def end_group(group: int) -> None:
    """End a group of processes: SIGINT, after 5 s SIGKILL."""
    for number, patience_s in ((signal.SIGINT, 5.0), (signal.SIGKILL, 0.5)):
        is_left, until = signal_group(group, number), time.monotonic() + patience_s
        while is_left and time.monotonic() < until:
            await asyncio.sleep(0.05)
            is_left = signal_group(group, 0)


class Process(NamedTuple):
    """A process as Linux shows it; `started` tells it from another of its number."""

    id: int
    name: str
    group: int
    session: int
    started: str


def processes() -> Iterator[Process]:
    """Each process, on Linux (blocking; proc(5), `/proc/pid/stat`)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            head, _, rest = stat.read_text(errors="replace").rpartition(")")
            fields = rest.split()
            ids = int(fields[2]), int(fields[3])
            yield Process(int(stat.parent.name), head.partition("(")[2], *ids, fields[19])


def names_of(groups: Collection[int]) -> str:
    """The names of their processes, on Linux (blocking)."""
    return ", ".join(process.name for process in processes() if process.group in groups)


class VmServer:
    """The VM's half of the contract: one command at a time, none twice."""

    def __init__(self, token: str, agent: str, folder: Path) -> None:
        """Reads the answers of earlier runs (blocking)."""
        self._trouble = ""  # why it is of no use yet
        self._token = f"Bearer {token}".encode() if token else b""
        self._agent = Agent(agent, folder)
        self._folder = folder
        self._images = folder / "images"
        self._tasks = Tasks()
        self._work: asyncio.Task[Any] | None = None  # until its answer is stored
        self._key = ""  # of it
        self._answers_file = folder / ".cockpit-vm-answers.json"
        self._answers: Recent[Json] = Recent(most=100)
        with suppress(OSError):
            stored = object_in(parse_json(self._answers_file.read_bytes()))
            for key, answer in stored.items():
                self._answers.put(key, answer, 0)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._check_token])
        app.router.add_get("/health", self._health)
        app.router.add_post("/command", self._command)
        app.router.add_post("/cancel", self._cancel)
        app.router.add_get("/images/{name}", self._image)
        app.cleanup_ctx.append(self._prepare)
        return app

    async def _prepare(self, app: web.Application) -> AsyncIterator[None]:
        self._tell_trouble()
        if repository := os.environ.get("GITHUB_REPOSITORY"):
            self._tasks.start(self._clone(repository))
        yield
        self._agent.close()
        await self._tasks.close()

    async def end_with_gateway(self, app: web.Application) -> None:
        """End everything once standard input closes: the gateway is gone."""

        def look() -> None:
            if not os.read(0, 1024):
                self._agent.close()
                os.killpg(0, signal.SIGKILL)

        asyncio.get_running_loop().add_reader(0, look)
        # A stopped process sees no input; Linux kills it when its parent dies.
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

    async def _clone(self, repository: str) -> None:
        """Clone it at the first start; the VM is not well before."""
        name = repository.rpartition("/")[2]
        if not REPOSITORY.fullmatch(repository):
            self._trouble = "GITHUB_REPOSITORY must be OWNER/NAME"
        elif not await asyncio.to_thread((self._folder / name).exists):
            self._trouble = f"{repository} is being cloned"
            part = f".{name}.part"  # it becomes whole, or another start begins it anew
            clone = f"git clone --quiet -- https://github.com/{repository}.git {part}"
            script = f"rm -rf {part} && {clone} && mv {part} ./{name}"
            async with asyncio.timeout(CLONE_S):
                said, code = await Agent(script, self._folder).run("")
            self._trouble = f"{repository} could not be cloned: {said}" if code else ""
        self._tell_trouble()

    def _tell_trouble(self) -> None:
        if trouble := self._trouble or self._agent.trouble():
            print(f"cockpit vm: {trouble}", file=sys.stderr, flush=True)

    def _has_token(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        return not self._token or hmac.compare_digest(given, self._token)

    @web.middleware
    async def _check_token(self, request: web.Request, handler: Any) -> Any:
        if request.path != "/health" and not self._has_token(request):
            raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        if trouble := self._trouble or self._agent.trouble():
            return web.json_response({"status": "failed", "note": trouble}, status=503)
        answer: Json = {"status": "ok"}
        if self._has_token(request):  # what it works on is nobody else's business
            if self._work:
                answer |= {"busy": True, "note": self._agent.last_line()}
            elif groups := self._agent.left_running():
                names = await asyncio.to_thread(names_of, groups)
                answer |= {"busy": True, "note": f"left running: {names}"}
        return web.json_response(answer)

    async def _command(self, request: web.Request) -> web.Response:
        body = object_in(parse_json(await request.read()))
        before = await asyncio.to_thread(shown_in, self._images)
        if not isinstance(body.get("text"), str):
            return web.json_response({"error": 'send {"text": "..."}'}, status=400)
        key = request.headers.get("Idempotency-Key", "")
        if key in self._answers:
            return web.json_response(self._answers[key])
        if self._work:
            return web.json_response({"error": "busy"}, status=409)
        self._key, self._work = key, self._tasks.start(self._run(body))
        # A caller who hangs up does not stop it: its answer is kept.
        answer = self._tasks.start(self._answer(key, self._work, before))
        return web.json_response(await asyncio.shield(answer))

    async def _cancel(self, request: web.Request) -> web.Response:
        """End the command, if it is meant; when none runs, what earlier ones left."""
        key, work = request.headers.get("Idempotency-Key", ""), self._work
        if work is None:
            groups = set() if key else self._agent.left_running()
            await asyncio.gather(*map(end_group, groups))
            stopped = bool(groups)
        # Once the agent has ended a stop would only lose the answer.
        elif stopped := key in ("", self._key) and not work.done():
            if not work.cancelling():
                work.cancel()
            await asyncio.wait({work})
        return web.json_response({"stopped": stopped})

    async def _run(self, body: Json) -> tuple[str, int]:
        """What the agent said, and its exit code."""
        async with aiohttp.ClientSession(timeout=INBOX_TIMEOUT) as session:
            fetch = functools.partial(fetch_picture, session, self._folder / "inbox")
            media = objects_in(body.get("media"))[:MAX_IMAGES]
            inbox = await asyncio.gather(*map(fetch, media))
        text = "\n".join([body["text"], *(["", "Pictures:", *inbox] if inbox else [])])
        return await self._agent.run(text, is_new=body.get("new") is True)

    async def _answer(self, key: str, work: asyncio.Task[Any], before: set[Shown]) -> Json:
        began = time.monotonic()
        try:
            await asyncio.wait({work})
            said, code = ("", CANCELLED) if work.cancelled() else work.result()
            answer = {
                "text": said,
                "images": await asyncio.to_thread(shown_since, self._images, before),
                "exitCode": code,
                "durationMs": int((time.monotonic() - began) * 1000),
            }
            if key:
                self._answers.put(key, answer, 0)
                content = to_json(self._answers).encode()
                await asyncio.to_thread(write_atomically, self._answers_file, [content])
        except StoreError as error:
            log_warning("answer_not_stored", error=str(error))
        finally:
            self._work = None
        return answer

    async def _image(self, request: web.Request) -> web.StreamResponse:
        wanted = request.match_info["name"]
        shown = await asyncio.to_thread(shown_in, self._images)
        if not any(name == wanted for _, _, name in shown):
            raise web.HTTPNotFound
        return web.FileResponse(self._images / wanted)


def prepare_environment(agent: str, folder: Path) -> None:
    """What an agent finds in it beside the VM's own variables (blocking)."""
    os.environ["WORKSPACE"] = str(folder)  # for `say`
    if agent.strip() == "claude" and os.geteuid() == 0:
        os.environ["IS_SANDBOX"] = "1"  # else it refuses to act without asking as root
    if os.environ.get("GITHUB_TOKEN") and "GIT_ASKPASS" not in os.environ:
        helper = folder / ".cockpit-askpass"
        write_atomically(helper, [ASKPASS.encode()])
        helper.chmod(0o700)
        os.environ |= {"GIT_ASKPASS": str(helper), "GIT_TERMINAL_PROMPT": "0"}


def serve_vm(given: argparse.Namespace, folder: Path) -> int:
    """Serve until a signal, or until the gateway that started it is gone."""
    prepare_environment(given.agent, folder)
    server = VmServer(os.environ.get("COCKPIT_TOKEN", ""), given.agent, folder)
    app, host, port = server.app(), given.host, given.port
    if given.until_stdin_closes:
        app.on_startup.append(server.end_with_gateway)
    try:
        web.run_app(app, host=host, port=port, access_log=None, shutdown_timeout=0.1)
    except (OSError, OverflowError) as error:
        reason = f"cannot listen on {host}:{port}: {error}; set PORT or --port"
        raise CockpitError(reason) from error
    return 0


def make_folder_of(user: pwd.struct_passwd, folder: Path) -> None:
    """Make it the user's, and nothing in it; no link is followed (blocking)."""
    with opened_folder(folder) as handle:
        os.fchown(handle, user.pw_uid, user.pw_gid)


def reap_until_end_of(child: int) -> int:
    """Pass signals on and reap orphans, as process 1 must; the child's exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def run_vm(given: argparse.Namespace) -> int:
    """The command `vm`; root makes the folders of `--user` and leaves it to that."""
    folder = Path(os.path.abspath(given.folder))
    if given.user and os.geteuid() == 0:
        try:
            user = pwd.getpwnam(given.user)
        except KeyError:
            reason = f"--user: there is no user {given.user} here; make it, or name another"
            raise CockpitError(reason) from None
        make_folder_of(user, Path(user.pw_dir))
        make_folder_of(user, folder)
        if child := os.fork():
            return reap_until_end_of(child)
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
        os.environ |= {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    os.chdir(folder)
    return serve_vm(given, folder)


# Of an agent or a script on the VM

SAY_AGAIN = Backoff(base_s=0.5, cap_s=10, attempts=1000, budget_s=60)


def explain_problem(raw: bytes) -> tuple[str, str]:
    """What the gateway says of an error (RFC 9457)."""
    problem = object_in(parse_json(raw))
    return str(problem.get("detail") or ""), str(problem.get("code") or "")


GATEWAY_API = Dialect(
    service="the gateway",
    request_id_header="X-Request-Id",
    explain=explain_problem,
    is_unprocessed=lambda status: False,
)


@contextlib.contextmanager
def copied(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Copies of pictures, in `images` for good if the block succeeds (blocking).

    Raises CockpitError.
    """
    if len(paths) > MAX_IMAGES:
        raise CockpitError(f"{len(paths)} pictures are too many; give {MAX_IMAGES} at most")
    images, copies = Path(os.environ.get("WORKSPACE") or ".", "images"), []
    try:
        for path in paths:
            if not (content := read_picture(path)):
                raise CockpitError(f"{path} is not a PNG, JPEG or GIF picture of at most 5 MB")
            copies.append(keep(images, f"{SAID}{digest_of(content)}-", content))
        yield [f"/images/{copy.name}" for copy in copies]
    except BaseException as error:
        for copy in copies:  # else they were left out at the end of the command
            copy.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CockpitError(f"{error.filename}: {error.strerror}") from error
        raise


async def say(words: str, paths: Sequence[Path], clock: Clock) -> None:
    """Text the VM's owner; tried for a minute. Raises CockpitError."""
    url = os.environ.get("COCKPIT_URL", "")
    token = os.environ.get("COCKPIT_TOKEN", "")
    if not is_url(url) or not token:
        raise CockpitError("COCKPIT_URL and COCKPIT_TOKEN are not set as on a VM")
    # The key: an attempt whose answer was lost is not texted twice.
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": secrets.token_hex(16)}
    async with aiohttp.ClientSession() as session:
        gateway = Upstream(session, session, GATEWAY_API, clock, Metrics(clock))
        call = functools.partial(gateway.ask, "at COCKPIT_URL", "POST", URL(f"{url}/messages"))
        with copied(paths) as images:
            body = {"text": words, "images": images}
            await retry(
                functools.partial(call, timeout_s=20, json=body, headers=headers),
                SAY_AGAIN,
                clock,
                when=lambda error: is_unavailable(error) and error.status != 429,
            )


def run_say(given: argparse.Namespace) -> int:
    """The command `say`; its exit code tells why nothing was texted."""
    try:
        asyncio.run(say(given.text, given.images, Clock()))
    except CockpitError as error:
        print(f"cockpit say: {error}", file=sys.stderr)
        match error:
            case UpstreamError(status=429):
                return 4
            case UpstreamError():
                return 3 if is_unavailable(error) else 1
        return 2
    return 0


# --- Provisioning ---

STATES_THAT_FAILED = ("failed", "launch_failed", "destroying", "destroyed")
ASK_HEALTH_EVERY_S = 0.25
CONFIRM_TIMES = 30  # once a second
UNDO = Backoff(base_s=0.5, cap_s=60)
UNDO_REFUSED = replace(UNDO, cap_s=300)
LOOK_AGAIN_S = (1.0, 4.0, 15.0)  # for a fresh app that Fly does not know (yet)
TEARDOWN_WAIT_S = 25.0
FAILED_KEPT_S = 3600.0
RESTARTED = "the gateway restarted during its set-up, so it is undone; ask again"
RECORD_TEXTS = (
    "vm_id machine_id vm_url phone_number region image state step created_at last_error"
)


def log_failure(event: str, fly: FlyClient, error: CockpitError, **about: Any) -> None:
    """A token that Fly refuses has a log line of its own."""
    level = logging.DEBUG if fly.trouble else logging.WARNING
    log_event(event, level=level, error=str(error), **about)


class Proof(NamedTuple):
    """Whose a machine is, and of which gateway; its route."""

    phone: str
    gateway_id: str
    route: Route


@dataclass(eq=False)
class Blueprint:
    """What a VM is made of, and how its machine tells whose it is."""

    settings: Settings
    keyring: Keyring
    routes: RouteStore

    @property
    def host(self) -> str:
        return urlsplit(self.settings.gateway.public_url).netloc + "/"

    def config(self, phone: str, route: Route) -> Json:
        """A machine's config; its service stays open through a long command."""
        vm = self.settings.vm
        # Fly's proxy may cut a connection that is silent for 60 s.
        options = {"idle_timeout": int(self.settings.limits.vm_command_timeout_s) + 60}
        port: Json = {"port": 3000, "handlers": ["http"], "http_options": options}
        if vm.is_public:
            port |= {"port": 443, "handlers": ["tls", "http"]}
        service: Json = {"protocol": "tcp", "internal_port": 3000, "ports": [port]}
        # A gating check would hide a busy VM; bare numbers would be nanoseconds.
        check: Json = {"type": "http", "kind": "informational", "port": 3000}
        check |= {"interval": "15s", "timeout": "5s", "grace_period": "30s"}
        mounts = [{"volume": route.volume_id, "path": "/data"}]
        return {
            "image": vm.image,
            "env": {"PORT": "3000", "HOST": "0.0.0.0"},
            "guest": vm.guest,
            "restart": {"policy": "always"},
            "services": [service | {"autostart": True, "autostop": "off"}],
            "checks": {"health": check | {"method": "GET", "path": "/health"}},
            # By `cockpit_launch` a create of unknown outcome is found.
            "metadata": self.stamp(phone, route) | {"cockpit_launch": route.vm_id},
            **({"mounts": mounts} if route.volume_id else self.rootfs()),
        }

    def rootfs(self) -> Json:
        """What keeps the root disk: waking may end in a cold boot."""
        persist = "always" if self.settings.limits.vm_idle_s else "restart"
        return {"rootfs": {"persist": persist}}

    def url(self, vm_id: str, machine_id: str, region: str) -> str:
        """Where a VM is reached."""
        return self.settings.vm.url.format(app=vm_id, machine_id=machine_id, region=region)

    def own_secrets(self, vm_id: str) -> dict[str, str]:
        """The secrets by which a VM reaches the gateway."""
        public_url = self.settings.gateway.public_url
        return {"COCKPIT_URL": public_url, "COCKPIT_TOKEN": self.keyring.vm_token(vm_id)}

    def stamp(self, phone: str, route: Route) -> dict[str, str]:
        """The metadata that says whose a machine is."""
        gateway_id = self.routes.gateway_id
        text = Keyring.owner_text(route.vm_id, phone, gateway_id, route.pairing)
        return {
            "cockpit_gateway": self.host + gateway_id,
            "cockpit_phone": phone,
            "cockpit_pairing": route.pairing,
            "cockpit_owner": self.keyring.sign(text),
        }

    def is_stamped(self, machine: Machine) -> bool:
        """Whether it names our host, truly or not."""
        return machine.metadata.get("cockpit_gateway", "").startswith(self.host)

    def proof(self, machine: Machine) -> Proof | None:
        """A living machine's: a VM can write its metadata, not sign it."""
        stamp = machine.metadata
        gateway_id = stamp.get("cockpit_gateway", "").removeprefix(self.host)
        phone, pairing = stamp.get("cockpit_phone", ""), stamp.get("cockpit_pairing", "")
        text = Keyring.owner_text(machine.app, phone, gateway_id, pairing)
        key_id = self.keyring.verifying_id(text, stamp.get("cockpit_owner", ""))
        # What is signed tells no borders between its parts; their forms do.
        is_formed = PHONE.fullmatch(phone) and PAIRING.fullmatch(pairing)
        is_alive = machine.host_ok and machine.state not in STATES_THAT_FAILED
        if not (key_id and is_formed and is_alive and self.is_stamped(machine)):
            return None
        route = Route(
            vm_id=machine.app,
            machine_id=machine.id,
            vm_url=self.url(machine.app, machine.id, machine.region),
            region=machine.region,
            image=machine.image,
            state="asleep" if machine.state in ("suspending", "suspended") else "ready",
            created_at=utc_seconds(machine.created_at or 0),
            key_id=key_id,
            pairing=pairing,
        )
        return Proof(phone, gateway_id, route)

    def own_proof(self, machine: Machine) -> Proof | None:
        """The same, of this gateway alone."""
        proof = self.proof(machine)
        return proof if proof and proof.gateway_id == self.routes.gateway_id else None


@dataclass(kw_only=True, eq=False)
class Work:
    """A set-up, restart, rotation or upgrade of one VM on its way."""

    vm_id: str
    phone: str
    what: str
    credentials: Mapping[str, str] = field(repr=False)
    is_torn_down: bool = False
    task: asyncio.Task[None] = field(init=False)

    async def outcome(self) -> None:
        """Wait for its end; raises Refusal."""
        await asyncio.wait({self.task})
        if not self.task.cancelled():
            return self.task.result()
        code, reason = "draining", f"a shutdown cut off the {self.what} of {self.vm_id}"
        if self.is_torn_down:
            code, reason = "torn_down", f"{self.vm_id} was deleted during its {self.what}"
        raise Refusal(code, reason)


@dataclass(kw_only=True, eq=False)
class Provisioning(Work):
    """A set-up, and how far it is."""

    what: str = "set-up"
    is_welcome: bool  # its owner is told that it is ready
    regions: list[str]  # not yet found full
    step: str = ""
    secrets_version: int = 0
    # Of the steps that ended; at each end `moved` is set.
    seconds: dict[str, float] = field(default_factory=dict)
    moved: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(kw_only=True, eq=False)
class Builder:
    """Sets VMs up, and waits for what Fly and they take their time with."""

    settings: Settings
    clock: Clock
    routes: RouteStore
    fly: FlyClient
    vms: VmClient
    blueprint: Blueprint
    metrics: Metrics

    def route(self, work: Work) -> Route:
        return self.routes.routes[work.phone]

    def in_time(self) -> TimeLimit:
        return self.clock.time_limit(self.settings.limits.provision_timeout_s)

    @property
    def limit(self) -> str:
        return f"within {self.settings.limits.provision_timeout_s:g} s (PROVISION_TIMEOUT_S)"

    # Waiting

    async def when_visible(self, call: Callable[[], Awaitable[T]]) -> T:
        """Fly may answer 404 or 401 for an app it has just made."""

        def is_hidden(error: UpstreamError) -> bool:
            return error.status in (401, 404) or "failed to get app" in error.detail

        return await retry(call, FRESH_APP, self.clock, when=is_hidden)

    async def wait_started(self, vm_id: str, machine: Machine, event: str = "") -> None:
        """Wait until Fly calls it started (after an event); raises Refusal."""
        since = {"from_event_id": event} if event else {"version": machine.instance_id}
        wait = functools.partial(self.fly.is_started, vm_id, machine.id, **since)
        while not await self.when_visible(wait):
            present = await self.fly.get_machine(vm_id, machine.id)
            if present.state in STATES_THAT_FAILED:
                reason = f"the machine did not start: Fly says {present.state}"
                raise Refusal("vm_unhealthy", reason, vm_id=vm_id)
            if present.state == "stopped":
                # Seen after updates; Fly refuses while it is still replacing it.
                with suppress(UpstreamRejected):
                    await self.fly.start_machine(vm_id, machine.id)

    async def wait_healthy(self, work: Work) -> None:
        """Poll until the VM answers /health."""
        while not await self.vms.is_healthy(self.route(work)):
            await self.clock.sleep(ASK_HEALTH_EVERY_S)

    async def wait_ready(self, work: Work, machine: Machine, event: str = "") -> None:
        """Wait until a VM that was changed is well again; raises Refusal."""
        try:
            async with self.in_time():
                await self.wait_started(work.vm_id, machine, event)
                await self.wait_healthy(work)
        except TimeoutError as error:
            reason = f"no answer of its /health {self.limit} of the {work.what}"
            raise Refusal("vm_unhealthy", reason) from error

    # Steps

    async def set_up(self, job: Provisioning) -> None:
        """Take all steps; each id is on disk as soon as it exists.

        Raises what they raise, or TimeoutError.
        """
        vm_id, fly, when_visible = job.vm_id, self.fly, self.when_visible
        async with self.in_time():
            await self.routes.commit()
            with self._step(job, "app"):
                await fly.create_app(vm_id)
            with self._step(job, "secrets"):
                values = {**job.credentials, **self.blueprint.own_secrets(vm_id)}
                version = await when_visible(lambda: fly.set_secrets(vm_id, values))
                job.secrets_version = version
            with self._step(job, "address"):
                await self._allocate(vm_id)
            with self._step(job, "volume"):
                await self._in_a_region(job, self._make_volume)
            with self._step(job, "machine"):
                machine = await self._in_a_region(job, self._make_machine)
            with self._step(job, "start"):
                await self.wait_started(vm_id, machine)
            with self._step(job, "health"):
                await self.wait_healthy(job)
            made: Json = {"state": "ready", "step": "", "extra": {"steps": job.seconds}}
            self.routes.put(job.phone, replace(self.route(job), **made))
            await self.routes.commit()

    @contextlib.contextmanager
    def _step(self, job: Provisioning, name: str) -> Iterator[None]:
        job.step, began = name, self.clock.monotonic()
        self.routes.put(job.phone, replace(self.route(job), step=name))
        yield
        passed_s = self.clock.monotonic() - began
        job.seconds[name] = round(passed_s, 3)
        self.metrics.provision_step.observe(passed_s, name)
        job.moved.set()

    async def _allocate(self, vm_id: str) -> None:
        # A private one on the network its callers are on: the gateway's, not the app's own.
        wanted = {"private_v6": self.settings.fly.network}
        if self.settings.vm.is_public:
            wanted = {"shared_v4": "", "v6": ""}
        for address in wanted.items():
            ensure = functools.partial(self.fly.ensure_address, vm_id, *address)
            await self.when_visible(ensure)

    async def _in_a_region(
        self, job: Provisioning, make: Callable[[Provisioning], Awaitable[T]]
    ) -> T:
        """In the first that has room; raises UpstreamError."""
        while True:
            try:
                return await self.when_visible(lambda: make(job))
            except UpstreamError as error:
                if error.code != NO_CAPACITY or len(job.regions) < 2:
                    raise
                region = job.regions.pop(0)
                log_warning("region_full", vm_id=job.vm_id, region=region, error=str(error))

    async def _make_volume(self, job: Provisioning) -> None:
        """One beside which no machine fitted goes."""
        route, vm, region = self.route(job), self.settings.vm, job.regions[0]
        if not vm.volume_gb or (route.volume_id and route.region == region):
            return
        if route.volume_id:
            await self.fly.delete_volume(job.vm_id, route.volume_id)
        made = await self.fly.ensure_volume(job.vm_id, region, vm.volume_gb, vm.guest)
        await self.routes.update(job.vm_id, volume_id=made[0], region=region)

    async def _make_machine(self, job: Provisioning) -> Machine:
        await self._make_volume(job)
        vm_id, route = job.vm_id, self.route(job)
        request = {
            "name": vm_id,
            # Fly reads a list itself; a volume pins the machine to its own.
            "region": route.region if route.volume_id else ",".join(job.regions),
            "config": self.blueprint.config(job.phone, route),
            "min_secrets_version": job.secrets_version,
        }
        machine = await self.fly.create_machine(vm_id, request, vm_id)
        url = self.blueprint.url(vm_id, machine.id, machine.region)
        region = machine.region or job.regions[0]
        await self.routes.update(vm_id, machine_id=machine.id, region=region, vm_url=url)
        return machine

    # Failures

    async def refusal(self, job: Provisioning, error: Exception) -> Refusal:
        """What the caller is told of a step that failed."""
        about: Json = {"vm_id": job.vm_id, "step": job.step}
        code, reason = "internal", "something went wrong here; the log says what"
        match error:
            case TimeoutError() if job.step in ("start", "health"):
                code, reason = await self._silence(job)
            case TimeoutError():
                code, reason = "fly_unavailable", f"Fly did not finish this step {self.limit}"
            case CockpitError():
                return refusal_for(error, **about)
            case _:
                log_error("provision_broken", exc_info=error, **about)
        return Refusal(code, reason, **about)

    async def _silence(self, job: Provisioning) -> tuple[str, str]:
        """Why a VM did not get well in time: a code, and words."""
        route = self.route(job)
        note = redact((await self.vms.health(route)).note, job.credentials.values())
        reason = f"the VM did not answer /health {self.limit}"
        if note:
            return "vm_unhealthy", f"{reason}: {note}"
        with suppress(UpstreamError, TimeoutError):
            async with self.clock.time_limit(10):
                machine = await self.fly.get_machine(job.vm_id, route.machine_id)
            if machine.checks_pass:
                reason = f"its check at Fly passes, but {route.vm_url} is not reached from here"
                remedy = "check VM_NETWORK and FLY_NETWORK (the gateway's own)"
                return "vm_unreachable", f"{reason} {self.limit}; {remedy}"
        return "vm_unhealthy", reason


@dataclass(kw_only=True, eq=False)
class Undo:
    """Deletes what is in `undo` of routes.json until Fly confirms it."""

    clock: Clock
    routes: RouteStore
    fly: FlyClient
    tasks: Tasks
    deleting: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    confirmed: Recent[None] = field(default_factory=lambda: Recent(10_000, for_s=3600))

    def start(self, vm_id: str) -> None:
        if vm_id in self.routes.undo and vm_id not in self.deleting:
            task = self.deleting[vm_id] = self.tasks.start(self._run(vm_id))
            task.add_done_callback(lambda _: self.deleting.pop(vm_id))

    async def _run(self, vm_id: str) -> None:
        failures = 0
        while vm_id in self.routes.undo:
            try:
                await self._delete(vm_id)
                del self.routes.undo[vm_id]
            except UpstreamError as error:
                self.routes.undo[vm_id]["last_error"] = str(error)
                log_failure("undo_retry", self.fly, error, vm_id=vm_id)
                failures += 1
                backoff = UNDO_REFUSED if self.fly.trouble else UNDO
                await backoff.pause(self.clock, failures)
        self.confirmed.put(vm_id, None, self.clock.monotonic())
        log_event("undo_confirmed", vm_id=vm_id)
        with suppress(StoreError):
            await self.routes.commit()

    async def _delete(self, vm_id: str) -> None:
        """Returns when the app is gone; raises UpstreamError."""
        created = str(self.routes.undo[vm_id].get("created_at") or "")
        # A create that was cut off may yet take effect: 404 is `not yet`.
        is_fresh = created > utc_seconds(self.clock.now() - 2 * FRESH_APP_S)
        for pause_s in (*LOOK_AGAIN_S * is_fresh, 0.0):
            if await self.fly.delete_app(vm_id):
                return await self._confirm(vm_id)
            await self.clock.sleep(pause_s)
        return None

    async def _confirm(self, vm_id: str) -> None:
        with suppress(UpstreamNotFound):
            for _ in range(CONFIRM_TIMES):
                await self.fly.get_app(vm_id)
                await self.clock.sleep(1)
            raise UpstreamUnavailable("fly", "delete app", "the app is still there")


def describe(stored: Json) -> Json:
    """The VM record, as far as a route or an entry of `undo` knows it."""
    record = {name: stored.get(name) or None for name in RECORD_TEXTS.split()}
    record["paired"] = not str(stored.get("pairing")).endswith(":unpaired")
    if "steps" in stored:  # known once it is ready
        record["steps"] = stored["steps"]
    return record


@dataclass(kw_only=True, eq=False)
class Provisioner:
    """Admits sign-ups; tears VMs down, also those left half-made by a kill."""

    settings: Settings
    clock: Clock
    routes: RouteStore
    builder: Builder
    undo: Undo
    keyring: Keyring
    tasks: Tasks
    metrics: Metrics
    on_ready: Callable[[str, bool], Awaitable[None]]  # (vm_id, welcome)
    on_gone: Callable[[str, str, str], Awaitable[None]]  # (vm_id, phone, reason)
    running: dict[str, Work]  # by vm_id: set-ups and changes
    failed: Recent[Json] = field(default_factory=lambda: Recent(1000, for_s=FAILED_KEPT_S))
    is_draining: bool = False

    # Asking for a VM

    def begin(self, order: Order) -> Provisioning:
        """Take an order on (no await: one of many wins); raises Refusal."""
        settings, clock, phone = self.settings, self.clock, order.phone
        failed = self._admit(phone)
        if failed:  # only now: who is refused loses nothing
            self.routes.begin_undo(phone, "replaced")
            self.undo.start(failed.vm_id)
        vm_id = f"{settings.vm.app_prefix}-{clock.random_id()}"
        route = Route(
            vm_id=vm_id,
            state="provisioning",
            image=settings.vm.image,
            region=order.region,
            created_at=utc_seconds(clock.now()),
            key_id=self.keyring.current_id,
            pairing="0:unpaired" if order.verify else "0:paired",
        )
        self.routes.put(phone, route)
        job = Provisioning(
            vm_id=vm_id,
            phone=phone,
            credentials=order.credentials,
            is_welcome=order.welcome,
            regions=[order.region] if order.region else list(settings.vm.regions),
        )
        self.running[vm_id] = job
        job.task = self.tasks.start(self._run(job))
        job.task.add_done_callback(lambda _: job.moved.set())
        log_event("provision_begun", vm_id=vm_id, phone=mask_phone(phone))
        return job

    def _admit(self, phone: str) -> Route | None:
        """The number's VM that a new one replaces, if any; raises Refusal."""
        limits, known = self.settings.limits, self.routes.routes.get(phone)
        if known and known.state != "failed":
            reason = f"this number has {known.vm_id} ({known.state}); delete it first"
            raise Refusal("phone_taken", reason, vm_id=known.vm_id)
        if self.is_draining:
            raise Refusal("draining", "this gateway is shutting down; try again in a moment")
        if why := self.routes.closed_because:
            raise Refusal("fly_unavailable", why)
        if (begun := self.routes.states["provisioning"]) >= limits.provision_limit:
            raise Refusal("too_many", f"{begun} VMs are being set up (PROVISION_LIMIT)")
        count = len(self.routes.routes) - bool(known)
        if limits.vm_limit and count >= limits.vm_limit:
            raise Refusal("vm_limit", f"there are {count} VMs (VM_LIMIT)")
        return known

    async def _run(self, job: Provisioning) -> None:
        """Cancelled it leaves all to who tears it down, or to the next start."""
        vm_id, began, outcome = job.vm_id, self.clock.monotonic(), "torn_down"
        try:
            await self.builder.set_up(job)
            outcome = "ready"
        except Exception as error:  # nor does an unforeseen one keep the number
            refusal = await self.builder.refusal(job, error)
            outcome, words = refusal.code, refusal.detail
            del self.running[vm_id]  # from here on a teardown has nothing to cancel
            log_warning("provision_failed", vm_id=vm_id, step=job.step, code=outcome, error=words)
            is_made = job.step != "" and not isinstance(error, NameTaken)
            await self._let_go(job.phone, "failed", words, is_made=is_made)
            raise refusal from error
        finally:
            self.running.pop(vm_id, None)
            self.metrics.provision.observe(self.clock.monotonic() - began, outcome)
        phone = mask_phone(job.phone)
        log_event("provision_ready", vm_id=vm_id, phone=phone, seconds=job.seconds)
        await self.on_ready(vm_id, job.is_welcome)

    # Tearing one down

    async def _let_go(
        self, phone: str, reason: str, error: str = "", *, is_made: bool = True
    ) -> None:
        """Free the number, tell whoever waits, undo what is made."""
        vm_id = self.routes.routes[phone].vm_id
        if reason == "failed":
            record = self.record(vm_id) | {"state": "failed", "last_error": error}
            self.failed.put(vm_id, record, self.clock.monotonic())
        self.routes.begin_undo(phone, reason, error)
        if not is_made:
            del self.routes.undo[vm_id]
        with suppress(StoreError):  # a full disk must not keep a VM alive
            await self.routes.commit()
        # Not before: killed here, the VM would live on with its texts dropped.
        await self.on_gone(vm_id, phone, reason)
        self.undo.start(vm_id)

    async def tear_down(self, vm_id: str) -> bool:
        """Destroy a VM in any state; whether Fly confirmed it in 25 s."""
        log_event("teardown", vm_id=vm_id)
        if work := self.running.pop(vm_id, None):
            work.is_torn_down = True
            work.task.cancel()
            await asyncio.wait({work.task})
        if found := self.routes.find(vm_id):
            await self._let_go(found[0], "torn_down")
        self.undo.start(vm_id)  # unless the first of two callers did
        if undo := self.undo.deleting.get(vm_id):
            with suppress(TimeoutError):
                async with self.clock.time_limit(TEARDOWN_WAIT_S):
                    await asyncio.wait({undo})
        is_gone = vm_id not in self.routes.undo
        if is_gone:
            self.failed.forget(vm_id)
        return is_gone

    # Start and stop

    async def recover(self) -> None:
        """At start: undo what is unfinished."""
        for phone, route in list(self.routes.routes.items()):
            if route.state in ("provisioning", "deleting"):
                log_warning("unfinished_undone", vm_id=route.vm_id, was=route.state)
            if route.state == "provisioning":
                await self._let_go(phone, "failed", RESTARTED)
            elif route.state == "deleting":  # by the first version
                await self._let_go(phone, "torn_down")
        if self.routes.is_new:
            with suppress(StoreError):
                await self.routes.commit()
        for vm_id in list(self.routes.undo):
            self.undo.start(vm_id)

    async def drain(self) -> None:
        """Wait for what is under way (the caller bounds the wait)."""
        ends = [work.outcome() for work in self.running.values()]
        await asyncio.gather(*ends, return_exceptions=True)

    def record(self, vm_id: str) -> Json:
        """Of a VM that is there, goes, or failed lately; raises Refusal."""
        if found := self.routes.find(vm_id):
            return describe(found[1].to_json() | {"phone_number": found[0]})
        for known, entry in self.routes.undo.items():
            if entry.get("machine_id") == vm_id:
                vm_id = known
        if self.failed.is_fresh(vm_id, self.clock.monotonic()):
            return self.failed[vm_id]
        undone = self.routes.undo.get(vm_id)
        if undone is None:
            raise Refusal("unknown_vm", f"there is no VM {vm_id}")
        state = "failed" if undone.get("reason") == "failed" else "deleting"
        return describe(undone | {"vm_id": vm_id, "state": state})


# --- In flight ---
#
# One VmState per VM, in memory, and the MessageStore beneath. Inbox takes texts in, Runner hands them
# to VMs, Sender tells their owners.

# What the gateway itself tells an owner.
NO_VM_YET = "This number has no cockpit VM yet. Sign up: {url}"
SETTING_UP = "Your VM is being set up. Your text is kept."
QUEUE_FULL = "Your queue is full ({n} waiting). This text was not kept: {texts}"
TOO_FAST = "More than {n} texts a minute. This text was not kept; wait a minute."
VM_AWAY = "Your VM is restarting... Your text is kept and will run when it is back."
NO_ANSWER = {  # by the outcome of a text
    "expired": "Not run, your VM was away too long: {texts}",
    "crashed": "Your VM went away twice while running this; not tried again: {texts}",
    "silent": "No answer after {s:g} s; it may still be running: {texts}",
    "failed": "Your VM answered with an error ({status}): {texts}",
}
DONE = "Done, no output."
UNREADABLE = "Your VM's answer could not be read."
VM_GONE = "Your VM is gone."
SET_UP_FAILED = "Your VM could not be set up."
WELCOME = "Your VM is ready. Text me anything."
STILL_WORKING = "Still working on it."
STOPPED = "Stopped."
CANNOT_STOP = "Your VM cannot stop a command; cockpit restart restarts it."
NOT_STOPPED = "Your VM did not answer: nothing was stopped. cockpit cancel drops what waits."
NOTHING_RUNS = "Nothing is running."
NEXT_IS_NEW = "The next text starts a new conversation."
IMAGE_AS_LINK = "An image that could not be sent; for a day it is here: {url}"
PICTURE_ELSEWHERE = "A picture was not passed on: its address is not Twilio's."
TEXT_THE_CODE = "Text the code from the sign-up page to connect this phone."
CONNECTED = "Connected. Text me anything."
LOCKED = "Locked. Nothing is run until you text the code from the sign-up page."
RESTART_BEGUN = "Your VM is being restarted. What waits will run when it is back."
COMMANDS_HELP = """cockpit status: how your VM is
cockpit stop: end what runs
cockpit new: begin a new conversation
cockpit restart: restart it
cockpit queue: what runs and waits
cockpit cancel: drop what waits
cockpit lock: run nothing more until you text a new code
Anything else goes to your VM."""

TRACES_KEPT = 10_000
TEXTS_SHOWN = 20  # of one VM, in its record


@dataclass(slots=True, kw_only=True, eq=False)
class Trace:
    """One text's way through the gateway, without its words; wall-clock seconds."""

    sid: str
    vm_id: str
    request_id: str
    received: float
    outcome: str = "waiting"
    attempts: int = 0  # by this process
    parts: int = 0
    reached: dict[str, float] = field(default_factory=dict)  # by step
    errors: Sequence[tuple[float, str]] = ()

    def ms_to(self, step: str) -> int | None:
        at = self.reached.get(step)
        return None if at is None else round((at - self.received) * 1000)

    def summary(self) -> Json:
        return {
            "message_sid": self.sid,
            "vm_id": self.vm_id or None,
            "request_id": self.request_id or None,
            "outcome": self.outcome,
            "attempts": self.attempts,
            "parts": self.parts,
        }

    def to_json(self) -> Json:
        reached = sorted(self.reached.items(), key=lambda step: step[1])
        steps = [
            {"step": step, "at": utc_millis(at), "ms": round((at - self.received) * 1000, 1)}
            for step, at in [("received", self.received), *reached]
        ]
        errors = [{"at": utc_millis(at), "error": error} for at, error in self.errors]
        return {**self.summary(), "steps": steps, "errors": errors}

    def note_error(self, now: float, error: str) -> None:
        """The last ten are kept."""
        self.errors = *self.errors[-9:], (now, error)


@dataclass(slots=True, kw_only=True, eq=False)
class Text:
    """An accepted text on its way to its VM; wall-clock seconds."""

    sid: str
    vm_id: str
    body: str
    arrived: float
    reply_to: Address
    media: Sequence[Sequence[str]] = ()
    handed_over: bool = False  # so says the store
    may_have_reached: bool = False
    drops: int = 0  # in a row
    dropped_at: float = 0.0
    busy_since: float | None = None
    is_resumed: bool = False  # an earlier process had handed it over
    trace: Trace

    def added(self) -> Change:
        row = self.sid, self.vm_id, self.arrived, self.body, json_list(self.media), *self.reply_to
        return ADD_TEXT, (*row, self.handed_over, self.drops, self.dropped_at)

    def updated(self) -> Change:
        return UPDATE_TEXT, (self.handed_over, self.drops, self.dropped_at, self.sid)

    def ended(self) -> Change:
        return END_TEXT, (self.sid,)


@dataclass(slots=True, kw_only=True, eq=False)
class Outbound:
    """Something to tell an owner: parts, then images, a message each."""

    id: str
    vm_id: str
    phone: str  # its recipient, also when the VM is gone
    reply_to: Address
    parts: Sequence[str]
    images: Sequence[str] = ()
    created_at: float  # by Twilio's clock
    sent: int = 0  # of the parts, then of the images
    in_words: list[int] = field(default_factory=list)  # pictures that go as a link
    attempted_at: float | None = None  # the same: it may have been sent since
    traces: Sequence[Trace] = ()  # of the texts it answers

    @property
    def size(self) -> int:
        return len(self.parts) + len(self.images)

    def added(self) -> Change:
        row = self.id, self.vm_id, self.phone, *self.reply_to, json_list(self.parts)
        progress = self.created_at, self.sent, json_list(self.in_words)
        return ADD_OUTBOUND, (*row, json_list(self.images), *progress)

    def updated(self) -> Change:
        if self.sent >= self.size:
            return self.ended()
        return UPDATE_OUTBOUND, (self.sent, json_list(self.in_words), self.id)

    def ended(self) -> Change:
        return END_OUTBOUND, (self.id,)


@dataclass(slots=True, kw_only=True, eq=False)
class KeptOfVm:
    """What is known of one VM, also after a restart; wall-clock seconds."""

    away_since: float | None = None
    error: str = ""  # why its owner did not hear something
    reply_to: Address = USUAL_ADDRESS  # where its owner last texted from
    opted_out: dict[str, bool] = field(default_factory=dict)  # by channel
    opted_at: dict[str, float] = field(default_factory=dict)
    vm_messages: list[tuple[float, int]] = field(default_factory=list)  # when, Twilio's count
    answered_at: float = 0.0  # the end of the last text it finished
    owes_restart: bool = False  # asked for by text, not yet begun
    owes_stop: bool = False  # the same
    owes_cancel: bool = False  # the same
    stopped_sid: str = ""  # its exit code tells nothing
    # Texts that begin a conversation; "": the next one does.
    new_sids: list[str] = field(default_factory=list)
    asked_for_code_at: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class VmState(KeptOfVm):
    """What is known of one VM, and what is on its way."""

    vm_id: str
    phone: str  # empty while no route tells it
    waiting: deque[Text] = field(default_factory=deque)  # the first one is being run
    outbox: deque[Outbound] = field(default_factory=deque)
    accepting: int = 0  # texts being stored
    runner: asyncio.Task[None] | None = None
    sender: asyncio.Task[None] | None = None
    waker: asyncio.Task[bool] | None = None
    is_handing_over: bool = False
    is_paused: bool = False  # being changed: it is handed nothing
    machine: asyncio.Lock = field(default_factory=asyncio.Lock)  # held to suspend or start it
    is_falling_asleep: bool = False
    closing_notice: str = ""  # it is gone: what is told of it
    was_told_of_setup: bool = False
    last_text: float | None = None
    last_call_failed: bool = False
    has_switched_key: bool = False
    probes: int = 0  # of `/health`, since it last answered a command
    # Monotonic:
    handed_over_at: float = NEVER  # its last command, while its answer is missing
    asked_fly_at: float = NEVER
    still_at: float = NEVER  # when its owner hears that the command still runs

    KEPT = tuple(kept.name for kept in dataclasses.fields(KeptOfVm))

    def put(self) -> Change:
        kept = {name: value for name in self.KEPT if (value := getattr(self, name))}
        return PUT_VM, (self.vm_id, to_json(kept))

    def restore(self, record: Json, now: float) -> None:
        """Nothing lies in the future, whoever set the clock."""
        for name in record.keys() & self.KEPT:
            setattr(self, name, record[name])
        self.reply_to = Address(*self.reply_to)
        self.answered_at = min(self.answered_at, now)
        self.asked_for_code_at = min(self.asked_for_code_at, now)

    def is_idle(self) -> bool:
        return not (self.waiting or self.outbox or self.accepting or self.runner or self.sender)

    def is_held(self) -> bool:
        """Whether nothing is run: it is changed, gone, or owes a verb."""
        owes_verb = self.owes_restart or self.owes_stop
        return self.is_paused or owes_verb or bool(self.closing_notice)

    def may_sleep(self) -> bool:
        """Whether nothing of it is in flight or to be done."""
        return self.is_idle() and not self.is_held()

    def is_turning(self) -> bool:
        """Whether it is just falling asleep or waking."""
        return self.machine.locked() or self.waker is not None

    def last_sign(self) -> float:
        """Its last text, answer or own message (wall clock)."""
        own = [at for at, _ in self.vm_messages[-1:]]
        return max(self.last_text or 0.0, self.answered_at, *own)

    @property
    def running(self) -> Text | None:
        """The text in the VM's hands; one that met 409 waits for another."""
        first = self.waiting[0] if self.waiting and self.is_handing_over else None
        waits = first and first.busy_since is not None and not first.may_have_reached
        return None if waits else first

    def queued(self) -> list[Text]:
        """The texts that wait, without the one that runs."""
        return [text for text in self.waiting if text is not self.running]

    def unreached(self) -> list[Text]:
        """Those of them that surely did not reach the VM."""
        return [text for text in self.queued() if not text.may_have_reached]

    def new_without(self, texts: Sequence[Text]) -> list[str]:
        """What one of these was to begin anew is left to the next text."""
        sids = [text.sid for text in texts]
        heir = next((text.sid for text in self.unreached() if text not in texts), "")
        return [heir if sid in sids else sid for sid in self.new_sids]


def quoted(*texts: Text | InboundMessage) -> str:
    """The starts of texts, for a notice."""
    return ", ".join(f'"{clean_text(text.body)[:80]}"' for text in texts)


def about(notice: str, *texts: Text | InboundMessage, **values: object) -> str:
    """A notice that quotes texts."""
    return notice.format(texts=quoted(*texts), **values)


def dropped(texts: Sequence[Text]) -> str:
    """What an owner is told who dropped texts."""
    return f"Not run: {len(texts)} text{'s' * (len(texts) > 1)} dropped."


def words_of(answer: Answer, *, is_stopped: bool) -> list[str]:
    """An answer as parts for a phone; who stopped it knows its exit code."""
    if answer.is_unreadable:
        return [UNREADABLE]
    code = f"Exit code {answer.exit_code}" if answer.exit_code and not is_stopped else ""
    if answer.text.strip():
        return split_text(f"{answer.text}\n{code}." if code else answer.text)
    if code:
        return [f"{code}, no output."]
    return [] if answer.images or is_stopped else [DONE]


class RelayState:
    """What is in flight and known of VMs: in memory, and in the store."""

    def __init__(self, store: MessageStore, clock: Clock, routes: RouteStore) -> None:
        self.store = store
        self.clock = clock
        self.routes = routes
        self.began = clock.now()
        self.vms: dict[str, VmState] = {}
        self.traces: Recent[Trace] = Recent(TRACES_KEPT)
        self.marks: dict[str, float] = {}
        self.is_draining = False

    def vm(self, vm_id: str, phone: str) -> VmState:
        if vm_id not in self.vms:
            self.vms[vm_id] = VmState(vm_id=vm_id, phone=phone)
        return self.vms[vm_id]

    def retire(self, vm: VmState) -> None:
        """Forget a VM that is gone, with its route, once all is told."""
        is_over = vm.closing_notice and vm.is_idle() and not self.routes.find(vm.vm_id)
        if is_over and self.vms.get(vm.vm_id) is vm:
            del self.vms[vm.vm_id]
            self.store.note(("DELETE FROM vms WHERE vm_id = ?", (vm.vm_id,)))

    def trace(self, sid: str, vm_id: str, received: float) -> Trace:
        return Trace(sid=sid, vm_id=vm_id, request_id=REQUEST_ID.get(), received=received)

    def remember(self, trace: Trace) -> None:
        self.traces.put(trace.sid, trace, trace.received)

    def texts_of(self, vm_id: str) -> list[Trace]:
        """The ways of a VM's last 20 texts, the youngest first."""
        newest_first = reversed(self.traces.values())
        return [trace for trace in newest_first if trace.vm_id == vm_id][:TEXTS_SHOWN]

    async def once(
        self, vm: VmState, message: InboundMessage, *changes: Change, **values: Any
    ) -> str | None:
        """Give a VM these values, at once, and store them with a text's SID, or not at all.

        None when the SID is new, else the reply of that time; raises StoreError.
        """
        # What was so already belongs to another text.
        changed = [name for name, value in values.items() if getattr(vm, name) != value]
        before = {name: getattr(vm, name) for name in changed}
        for name in changed:
            setattr(vm, name, values[name])
        known: str | None = ""
        try:
            stored = *changes, vm.put()
            known = await self.store.commit_once(message.sid, message.arrived, "", *stored)
        finally:
            for name, value in before.items() if known is not None else ():
                setattr(vm, name, value)
        if known is not None and before:  # what was stored meanwhile may tell otherwise
            self.store.note(vm.put())
        return known

    def set_mark(self, name: str, at: float) -> Change:
        self.marks[name] = at
        return "INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, at)

    async def load(self) -> list[str]:
        """At start: read everything; returns the SIDs of messages lately sent.

        Raises StoreError.
        """
        read = self.store.read
        now = self.clock.now()
        self.marks = {row["name"]: row["value"] for row in await read("SELECT * FROM marks")}
        if "begun" not in self.marks:
            await self.store.save(self.set_mark("begun", now))
        for row in await read("SELECT * FROM vms"):
            self._of(row).restore(object_in(parse_json(row["record"])), now)
        for row in await read("SELECT * FROM texts ORDER BY rowid"):
            vm = self._of(row)
            is_resumed = bool(row["handed_over"])
            row |= {name: min(row[name], now) for name in ("arrived", "dropped_at")}
            trace = self.trace(row["sid"], vm.vm_id, row["arrived"])
            self.remember(trace)
            row |= {"may_have_reached": is_resumed, "is_resumed": is_resumed}
            vm.waiting.append(Text(**fields_of(row), trace=trace))
        for row in await read("SELECT * FROM outbound ORDER BY rowid"):
            out = Outbound(**fields_of(row), attempted_at=row["created_at"])
            self._of(row).outbox.append(out)
        for vm in list(self.vms.values()):
            # Long gone, unless its route may yet be found.
            if not (vm.phone or self.routes.closed_because) and vm.is_idle():
                vm.closing_notice = VM_GONE
                self.retire(vm)
        return [row["sid"] for row in await read("SELECT sid FROM sent ORDER BY at")]

    def _of(self, row: Row) -> VmState:
        vm_id = row["vm_id"]
        if found := self.routes.find(vm_id):
            return self.vm(vm_id, found[0])
        undone = self.routes.undo.get(vm_id, {})
        return self.vm(vm_id, str(undone.get("phone_number") or ""))


def fields_of(row: Row) -> Row:
    """What a row of `texts` or `outbound` says, as its record names it."""
    names = row.keys() & {"media", "parts", "images", "in_words"}
    reply_to = Address(row.pop("channel"), row.pop("number"))
    return row | {name: json.loads(row[name]) for name in names} | {"reply_to": reply_to}


@dataclass(kw_only=True, eq=False)
class Part:
    """What each part of the relay works with."""

    settings: Settings
    clock: Clock
    routes: RouteStore
    state: RelayState
    tasks: Tasks
    metrics: Metrics


# --- Sending ---

# Callbacks come in any order: a status of no higher rank than the last says nothing new.
STATUSES = "accepted scheduled|queued|sending|sent|delivered undelivered failed canceled|read"
STATUS_RANKS = {
    status: rank for rank, alike in enumerate(STATUSES.split("|")) for status in alike.split()
}


@dataclass(kw_only=True, eq=False)
class Sender(Part):
    """The send lane of each VM: in order, one after the other."""

    keyring: Keyring
    twilio: TwilioClient
    # By the SID of an answer's message, for its delivery report.
    sent_as: Recent[Sequence[Trace]] = field(default_factory=lambda: Recent(TRACES_KEPT))

    # What is to be told

    def outbound(
        self, vm: VmState, parts: Sequence[str], text: Text | None = None, **more: Any
    ) -> Outbound:
        """About a text where that came from, else where the owner last texted."""
        return Outbound(
            id=more.pop("id", "") or f"n-{self.clock.random_id()}",
            vm_id=vm.vm_id,
            phone=vm.phone,
            reply_to=(text or vm).reply_to,
            parts=parts,
            created_at=self.twilio.now(),
            **more,
        )

    async def notify(
        self, vm: VmState, notice: str, *changes: Change, text: Text | None = None
    ) -> None:
        out = self.outbound(vm, split_text(notice), text)
        await self.state.store.save(out.added(), *changes)
        self.queue(vm, out)

    async def finish(
        self,
        vm: VmState,
        texts: Sequence[Text],
        parts: list[str],
        outcome: str,
        images: Sequence[str] = (),
    ) -> None:
        """End these texts with what their owner is told, in one transaction."""
        traces = [text.trace for text in texts]
        out = self.outbound(vm, parts, texts[-1], images=images, id=texts[0].sid, traces=traces)
        # An earlier process may have sent its answer, and not noted it.
        resumed = [text.arrived - self.twilio.api.ahead_s for text in texts if text.is_resumed]
        out.attempted_at = min(resumed, default=None)
        self.note_ended(texts, outcome, out.size)
        if outcome in ("expired", "cancelled"):
            vm.new_sids = vm.new_without(texts)
        changes = [text.ended() for text in texts]
        if out.size:
            changes.append(out.added())
        # With an answer only `answered_at` is new: what waits needs it, and nothing else.
        if outcome != "answered" or len(vm.waiting) > 1:
            changes.append(vm.put())
        await self.state.store.save(*changes)
        for text in texts:
            if text in vm.waiting:
                vm.waiting.remove(text)
        self.queue(vm, out)

    async def drop(self, vm: VmState) -> None:
        """What waits for a VM that was locked is not run."""
        if texts := vm.unreached():
            vm.waiting = deque(text for text in vm.waiting if text not in texts)
            await self.finish(vm, texts, [dropped(texts)], "cancelled")

    def closing_words(self, notice: str, texts: Sequence[Text | InboundMessage]) -> str:
        """What is told of a VM that is gone, and of texts not run."""
        url = self.settings.gateway.onboarding_url if notice == VM_GONE else ""
        not_run = f" Not run: {quoted(*texts)}" if texts else ""
        return notice + not_run + (f" Sign up: {url}" if url else "")

    def note_ended(self, texts: Sequence[Text], outcome: str, parts: int) -> None:
        for text in texts:
            text.trace.outcome = outcome
            text.trace.parts = parts
            text.trace.reached["answered"] = self.clock.now()
            if outcome not in ("answered", "cancelled"):
                self.metrics.note_text(failed=True)
        self.metrics.texts_finished.add(outcome, by=len(texts))

    def command_of(self, vm: VmState, text: Text) -> Json:
        """What a VM is handed: words, and links to pictures at Twilio."""
        now = self.clock.now()
        media = [
            {"url": self._link(vm.vm_id, path, now), "content_type": kind}
            for url, kind in text.media
            if (path := self.twilio.media_path(url))
        ]
        more = {"new": True} if text.sid in vm.new_sids else {}
        return {"text": text.body, "media": media, **more}

    def pictures_elsewhere(self, message: InboundMessage | Text) -> int:
        """How many of its pictures do not lie at Twilio."""
        return sum(not self.twilio.media_path(url) for url, _ in message.media)

    # Sending it

    def queue(self, vm: VmState, out: Outbound) -> None:
        """Send it after what is queued already; the store has it."""
        vm = self.state.vms.setdefault(vm.vm_id, vm)
        vm.outbox.append(out)
        self.start(vm)

    def start(self, vm: VmState) -> None:
        # A run lane at its end goes on as the send lane: a task less per text.
        goes_on = not vm.waiting and vm.runner is asyncio.current_task()
        if vm.outbox and not (vm.sender or goes_on):
            vm.sender = self.tasks.start(self.run(vm))

    async def run(self, vm: VmState) -> None:
        if vm.sender not in (None, asyncio.current_task()):
            return
        vm.sender = asyncio.current_task()
        REQUEST_ID.set("")  # it outlives the request that happened to start it
        try:
            while vm.outbox:
                await self._deliver(vm, vm.outbox[0])
                vm.outbox.popleft()
        finally:
            vm.sender = None
            self.state.retire(vm)

    async def _deliver(self, vm: VmState, out: Outbound) -> None:
        while out.sent < out.size:
            if obstacle := self._obstacle(vm, out):
                return self._give_up(vm, out, obstacle)
            sms = self._sms(out)
            try:
                sid = await self.twilio.deliver(
                    sms,
                    out.attempted_at,
                    lambda: not self._obstacle(vm, out),
                    vm_id=vm.vm_id,
                    message_sid=out.id,
                )
            except UpstreamError as error:
                if not sms.media or action_for(error) != "as_link":
                    is_known = error.code in TWILIO_ERRORS
                    reason = f"{explain_code(error.code)} ({error})" if is_known else str(error)
                    return self._give_up(vm, out, reason, error.code)
                out.in_words.append(out.sent)
                # Before it goes: after a kill these words are looked up.
                await self.state.store.save(out.updated())
                continue
            out.sent += 1
            self.metrics.messages_sent.add("sent")
            if out.traces:
                self.sent_as.put(sid, out.traces, 0)
            self.state.store.note(out.updated(), (NOTE_SENT, (sid, self.clock.now())))
        for trace in out.traces:
            self._note_sent(trace, out.phone)
        return None

    def _obstacle(self, vm: VmState, out: Outbound) -> str:
        """Why something may not be told any more, or nothing."""
        route = self.routes.routes.get(out.phone)
        if route is not None and route.vm_id != out.vm_id:
            return "the number has another VM, perhaps another owner"
        return explain_code("21610") if vm.opted_out.get(out.reply_to.channel) else ""

    def _sms(self, out: Outbound) -> Sms:
        """The next message of what is to be told."""
        body, media = "", ""
        if out.sent < len(out.parts):
            body = out.parts[out.sent]
        else:
            media = self._link(out.vm_id, out.images[out.sent - len(out.parts)], out.created_at)
        if out.sent in out.in_words:
            body, media = IMAGE_AS_LINK.format(url=media), ""
        channel, number = out.reply_to
        sender = number or channel + self.settings.twilio.phone_number
        callback = self.callback and self.callback + out.vm_id
        return Sms(sender, channel + out.phone, body, media, callback)

    @functools.cached_property
    def callback(self) -> str:
        """Where Twilio reports to, without the vm_id; nothing if it cannot."""
        public_url = self.settings.gateway.public_url
        is_local = is_loopback(urlsplit(public_url).hostname or "")
        return "" if is_local else f"{public_url}/sms/status?vm="

    def _link(self, vm_id: str, path: str, since: float) -> str:
        """An address under which a picture can be fetched for a day."""
        signed = self.keyring.sign_link(vm_id, path, since)
        return f"{self.settings.gateway.public_url}/media/{signed}"

    # What came of it

    def _note_sent(self, trace: Trace, phone: str) -> None:
        """The one log line of a text with which all is well."""
        now = trace.reached["sent"] = self.clock.now()
        if trace.outcome == "answered":
            self.metrics.text_answer.observe(now - trace.received)
            self.metrics.recent_answers.append(now - trace.received)
        log_event(
            "text_done",
            phone=mask_phone(phone),
            **trace.summary(),
            ms_to_hand_over=trace.ms_to("handed_over"),
            ms_to_answer=trace.ms_to("answered"),
            ms_to_sent=trace.ms_to("sent"),
        )

    def _give_up(self, vm: VmState, out: Outbound, reason: str, code: str = "") -> None:
        log_error("send_failed", vm_id=vm.vm_id, message_sid=out.id, error=reason)
        self.metrics.messages_sent.add("failed")
        for trace in out.traces:
            trace.outcome = "send_failed"
        self.note_failure(vm, out.reply_to.channel, out.traces, reason, code)
        self.state.store.note(out.ended())

    def note_failure(
        self, vm: VmState, channel: str, traces: Sequence[Trace], reason: str, code: str
    ) -> None:
        """Why an owner did not hear something stands in the VM's record."""
        now = self.clock.now()
        for trace in traces:
            trace.note_error(now, reason)
        if code in TWILIO_ERRORS and TWILIO_ERRORS[code].action == "opted_out":
            vm.opted_out[channel] = True
            vm.opted_at[channel] = now
        vm.error = reason
        self.state.store.note(vm.put())


@dataclass(kw_only=True, eq=False)
class DeliveryReports(Part):
    """What Twilio reports: out of order, twice, before the create's answer."""

    twilio: TwilioClient
    sender: Sender
    # Of a message's last status.
    ranks: Recent[int] = field(default_factory=lambda: Recent(20_000))

    def handle(self, form: Mapping[str, str], vm_id: str) -> None:
        """One callback; `vm_id` is what its address named."""
        sid, status, to = (form.get(name, "") for name in ("MessageSid", "MessageStatus", "To"))
        rank = STATUS_RANKS.get(status, -1)
        now = self.clock.now()
        if rank <= self.ranks.get(sid, -1):
            return
        self.ranks.put(sid, rank, now)
        self.metrics.deliveries.add(status)
        found = self.routes.find(vm_id)
        phone = to.removeprefix(WHATSAPP)
        if found is None or found[0] != phone or rank < STATUS_RANKS["delivered"]:
            return
        vm = self.state.vm(vm_id, phone)
        channel = to.removesuffix(phone)
        traces = self.sender.sent_as.get(sid, ())
        if status in ("delivered", "read"):
            for trace in traces:
                trace.reached["delivered"] = now
            if vm.error and not vm.opted_out.get(channel):
                vm.error = ""
                self.state.store.note(vm.put())
            return
        # It is not sent again.
        code = form.get("ErrorCode", "")
        reason = explain_code(code)
        policy = TWILIO_ERRORS.get(code)
        log_warning("undelivered", vm_id=vm_id, message_sid=sid, error=reason)
        self.metrics.twilio_errors.add(code if policy else "other")
        if policy and policy.action == "retry_and_alert":
            self.twilio.trouble = f"texts do not arrive: {reason}"
        self.sender.note_failure(vm, channel, traces, reason, code)


# --- Running ---

VM_RETURN = Backoff(base_s=0.25, cap_s=4)
VM_BUSY = Backoff(base_s=0.25, cap_s=10)
WAKE = Backoff(base_s=0.1, cap_s=1, attempts=1000, budget_s=60)
WAKE_S = 5.0  # so long a sleeper may take to answer without a word to its owner
BUSY_LIMIT_S = 1800.0
ASK_FLY_EVERY_S = 15.0
STILL_AFTER_S, STILL_EVERY_S, STILL_UNTIL_S = 60.0, 300.0, 1800.0


@dataclass(kw_only=True, eq=False)
class Watch(Part):
    """Tells whose commands run long; one task, while anything runs."""

    sender: Sender
    vms: VmClient
    task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self.task is None:
            self.task = self.tasks.start(self._run())

    async def _run(self) -> None:
        try:
            while busy := [vm for vm in self.state.vms.values() if vm.is_handing_over]:
                now = self.clock.monotonic()
                for vm in busy:
                    # Behind anything still to be sent it would only come late.
                    if vm.running and vm.still_at <= now and not vm.outbox:
                        vm.still_at += STILL_EVERY_S
                        if now < vm.handed_over_at + STILL_UNTIL_S:
                            self.tasks.start(self._tell(vm, vm.running))
                pause_s = max(1.0, min(vm.still_at for vm in busy) - now)
                await self.clock.sleep(min(STILL_AFTER_S, pause_s))
        finally:
            self.task = None

    async def _tell(self, vm: VmState, text: Text) -> None:
        note = await self.note(vm)
        if vm.running is text:
            await self.sender.notify(vm, f"{STILL_WORKING} {note}".strip(), text=text)

    async def note(self, vm: VmState, within_s: float = VmClient.HEALTH_S) -> str:
        """What a VM is doing, in a line; one away or asleep is not asked."""
        route = self.routes.of(vm.vm_id)
        is_there = vm.away_since is None and not vm.is_paused
        if route and route.state == "ready" and is_there:
            return (await self.vms.health(route, within_s)).note
        return ""


@dataclass(kw_only=True, eq=False)
class Waker(Part):
    """Starts machines that rest: put to sleep, or found stopped in an outage."""

    fly: FlyClient
    vms: VmClient

    def begin(self, vm: VmState) -> asyncio.Task[bool]:
        """Start it, if it rests; whether Fly did, which may take minutes."""
        if vm.waker is None:
            vm.asked_fly_at = self.clock.monotonic()
            vm.waker = self.tasks.start(self._wake(vm))
        return vm.waker

    async def rouse(self, vm: VmState, within_s: float = WAKE_S) -> bool:
        """Wake a sleeper; whether it answers within so long."""
        with suppress(TimeoutError):
            async with self.clock.time_limit(within_s):
                return await asyncio.shield(self.begin(vm))
        return False

    async def _wake(self, vm: VmState) -> bool:
        try:
            await self.start_machine(vm)
            async with self.clock.time_limit(WAKE.budget_s):
                # What is handed to it before its `/health` answers is refused.
                while (route := self._sleeper(vm.vm_id)) and not await self.vms.is_healthy(route):
                    await self.clock.sleep(0.05)
            await self.note_awake(vm.vm_id)
            return True
        except (UpstreamError, TimeoutError) as error:
            log_warning("wake_failed", vm_id=vm.vm_id, error=str(error) or "no answer in time")
            return False
        finally:
            vm.waker = None

    def _sleeper(self, vm_id: str) -> Route | None:
        """The route of a VM that is asleep."""
        route = self.routes.of(vm_id)
        return route if route and route.state == "asleep" else None

    async def start_machine(self, vm: VmState) -> None:
        """Never while it is being suspended; raises UpstreamError."""

        def may_start_yet(error: UpstreamError) -> bool:
            # While it is still falling asleep Fly refuses to start it.
            return is_unavailable(error) or error.status == HTTPStatus.PRECONDITION_FAILED

        async with vm.machine:
            route = self.routes.of(vm.vm_id)
            if route and route.state == "asleep":
                start = functools.partial(self._start_sleeper, route)
                await retry(start, WAKE, self.clock, when=may_start_yet, vm_id=vm.vm_id)
                log_event("vm_woken", vm_id=vm.vm_id)
            elif route:
                machine = await self.fly.get_machine(vm.vm_id, route.machine_id)
                if machine.state in RESTING and machine.host_ok:
                    log_event("machine_started", vm_id=vm.vm_id, was=machine.state)
                    await self.fly.start_machine(vm.vm_id, machine.id)

    async def _start_sleeper(self, route: Route) -> None:
        try:
            await self.fly.start_machine(route.vm_id, route.machine_id)
        except UpstreamRejected:
            machine = await self.fly.get_machine(route.vm_id, route.machine_id)
            if machine.state not in ("starting", "started"):
                raise

    async def note_awake(self, vm_id: str) -> None:
        """It is `ready` from now on, whoever woke it."""
        if self._sleeper(vm_id):
            with suppress(StoreError):  # the write is tried on, and a sweep sees it too
                await self.routes.update(vm_id, state="ready")

    async def look(self, vm_id: str) -> None:
        """Whether a sleeper is awake, as Fly says; raises UpstreamError."""
        if route := self.routes.of(vm_id):
            machine = await self.fly.get_machine(vm_id, route.machine_id)
            is_up = machine.state == "started" and machine.host_ok
            vm = self.state.vms.get(vm_id)
            if is_up and not (vm and vm.is_falling_asleep):
                await self.note_awake(vm_id)


@dataclass(kw_only=True, eq=False)
class Runner(Part):
    """The run lane of each VM: a text at a time, in order; outages, deadlines."""

    vms: VmClient
    sender: Sender
    watch: Watch
    waker: Waker

    # The lane

    def is_free(self, vm: VmState, route: Route) -> bool:
        """Whether a text that came now would be handed over at once."""
        is_there = route.state == "ready" and vm.away_since is None
        return is_there and not (vm.waiting or vm.accepting or vm.runner or vm.is_held())

    def start(self, vm: VmState) -> None:
        if vm.runner is None and self._next(vm):
            vm.runner = self.tasks.start(self._run(vm))

    def _next(self, vm: VmState) -> tuple[Route, Text] | None:
        """What is to be run now, and by whom."""
        if not vm.waiting or vm.is_held() or self.state.is_draining:
            return None
        found = self.routes.find(vm.vm_id)
        if found is None or found[1].state == "provisioning":
            return None
        vm.phone, route = found
        return route, vm.waiting[0]

    async def _run(self, vm: VmState) -> None:
        """No await between the look that finds nothing and its end."""
        REQUEST_ID.set("")  # it outlives the request that happened to start it
        try:
            while job := self._next(vm):
                await self._step(vm, *job)
            vm.runner = None
            await self.sender.run(vm)
        finally:
            if vm.runner is asyncio.current_task():
                vm.runner = None
                self.sender.start(vm)

    async def stop(self, vm: VmState) -> None:
        """Give up what is in the VM's hands; it is not finished by that."""
        if vm.runner:
            vm.runner.cancel()
            await asyncio.wait({vm.runner})
            vm.runner = None  # one that had not begun yet did not say so itself

    async def pause(self, vm: VmState, patience_s: float) -> None:
        """Hand it nothing more until `resume`; what it runs has so long to end."""
        vm.is_paused = True
        if vm.runner and vm.is_handing_over:
            with suppress(TimeoutError):
                async with self.clock.time_limit(patience_s):
                    await asyncio.wait({vm.runner})

    async def resume(self, vm: VmState, *, answered_at: float = 0.0) -> None:
        """Go on; `answered_at`: it was restarted by then, what it ran is cut off."""
        if answered_at:
            await self.stop(vm)
            vm.answered_at = max(vm.answered_at, answered_at)
        vm.is_paused = False
        self.start(vm)

    # One text

    async def _step(self, vm: VmState, route: Route, text: Text) -> None:
        """One step towards an answer to the first text; then all is looked at anew."""
        is_away = vm.away_since is not None
        if text.drops >= 2:
            await self._finish(vm, [text], "crashed")
        elif (is_away or not text.trace.attempts) and self.is_late(vm, text):
            await self._expire(vm, text)
        elif not (route.is_paired or text.may_have_reached):  # locked since it came
            await self.sender.drop(vm)
        elif route.state == "asleep" and not is_away:
            if not await self.waker.rouse(vm) and text in vm.waiting:
                await self._announce_outage(vm, text)
        elif not is_away or await self._is_back(vm, route, text):
            if not text.handed_over:
                text.handed_over = True
                await self.state.store.save(text.updated())
            # It may have been cancelled, or its VM changed.
            if self._next(vm) == (route, text):
                await self._attempt(vm, route, text)

    async def _attempt(self, vm: VmState, route: Route, text: Text) -> None:
        vm.is_handing_over = True
        vm.handed_over_at = self.clock.monotonic()
        vm.still_at = vm.handed_over_at + STILL_AFTER_S
        self.watch.start()
        text.trace.attempts += 1
        if text.trace.attempts == 1:
            now = text.trace.reached["handed_over"] = self.clock.now()
            self.metrics.text_handover.observe(now - text.arrived)
        try:
            answer = await self.vms.command(route, text.sid, self.sender.command_of(vm, text))
        except VmAway as error:
            await self._on_unreachable(vm, route, text, error)
        except VmBusy:
            await self._wait_while_busy(vm, text)
        except VmSilent:
            vm.last_call_failed = True
            await self._finish(vm, [text], "silent", s=self.vms.command_timeout_s)
        except VmFailed as error:
            if error.status == HTTPStatus.UNAUTHORIZED and await self._switch_key(vm, route):
                return  # it goes again
            self._note_answer(vm, ends_outage=error.status < 500)
            await self._finish(vm, [text], "failed", status=error.status)
        else:
            self._note_answer(vm)
            parts = words_of(answer, is_stopped=text.sid == vm.stopped_sid)
            await self.sender.finish(vm, [text], parts, "answered", answer.images)
        finally:
            vm.is_handing_over = False

    async def _finish(self, vm: VmState, texts: list[Text], outcome: str, **more: object) -> None:
        """End texts that have no answer."""
        words = about(NO_ANSWER[outcome], *texts, **more)
        await self.sender.finish(vm, texts, split_text(words), outcome)

    async def _switch_key(self, vm: VmState, route: Route) -> bool:
        """A killed rotation may have left another token: it is tried once."""
        others = [key_id for key_id in self.sender.keyring.ids if key_id != route.key_id]
        if vm.has_switched_key or not others:
            return False
        vm.has_switched_key = True
        log_warning("vm_key_switched", vm_id=vm.vm_id)
        with suppress(StoreError):
            await self.routes.update(vm.vm_id, key_id=others[0])
        return True

    # How its VM is

    def _note_answer(self, vm: VmState, *, ends_outage: bool = True) -> None:
        """It answered on /command: what waits does so from now; below 500 it is back."""
        vm.answered_at = self.clock.now()
        vm.probes = 0
        vm.has_switched_key = False
        if ends_outage:
            vm.last_call_failed = False
            vm.handed_over_at = NEVER
            if vm.away_since is not None:
                vm.away_since = None
                self.state.store.note(vm.put())
                log_event("vm_back", vm_id=vm.vm_id)

    async def _on_unreachable(self, vm: VmState, route: Route, text: Text, error: VmAway) -> None:
        vm.last_call_failed = True
        trace = text.trace
        reason = str(error)
        trace.note_error(self.clock.now(), reason)
        whose = {"message_sid": text.sid, "attempt": trace.attempts}
        log_warning("vm_unreachable", vm_id=vm.vm_id, **whose, error=reason)
        is_healthy = False
        if error.may_have_reached:
            is_healthy = await self.vms.is_healthy(route)
            # A proxy's 502 counts only if the VM is there; many prolong no wait.
            is_drop = error.is_drop or is_healthy
            if is_drop or not text.may_have_reached:
                text.dropped_at = self.clock.now()
            text.may_have_reached = True
            text.drops += is_drop
        text.handed_over = text.may_have_reached
        await self.state.store.save(text.updated())
        if not is_healthy:  # else the road may be at fault: it goes again at once
            await self._announce_outage(vm, text)

    async def _announce_outage(self, vm: VmState, text: Text) -> None:
        """Once per outage, also across restarts."""
        if vm.away_since is None:
            vm.away_since = self.clock.now()
            self.metrics.outages.add()
            await self.sender.notify(vm, VM_AWAY, vm.put(), text=text)

    async def _is_back(self, vm: VmState, route: Route, text: Text) -> bool:
        """After a pause: whether an absent VM answers /health."""
        # A machine that rests does not come back by itself.
        if self.clock.monotonic() - vm.asked_fly_at >= ASK_FLY_EVERY_S:
            self.waker.begin(vm)
        vm.probes += 1
        left_s = self._deadline(vm, text) - self.clock.now()
        await VM_RETURN.pause(self.clock, vm.probes, at_most=left_s + 0.001)
        # One that is just being put to sleep still answers, but not for long.
        if not await self.vms.is_healthy(route) or vm.is_falling_asleep:
            return False
        await self.waker.note_awake(vm.vm_id)
        return True

    async def _wait_while_busy(self, vm: VmState, text: Text) -> None:
        """409: wait without a notice; the VM is not away."""
        self._note_answer(vm)
        text.drops = 0  # the VM lived through it
        text.busy_since = text.busy_since or vm.answered_at
        if vm.answered_at - text.busy_since > BUSY_LIMIT_S:
            return await self._finish(vm, [text], "failed", status=409)
        if text.trace.attempts % 10 == 1:
            self.state.store.note(vm.put())
        await VM_BUSY.pause(self.clock, text.trace.attempts)
        vm.answered_at = self.clock.now()  # nor does this pause, should it be away then
        return None

    # Deadlines

    def _deadline(self, vm: VmState, text: Text) -> float:
        """Until when a text waits for its VM (wall clock), from its arrival or its cut.

        What was handed over before the gateway's start waits from then on.
        """
        cut_at = text.dropped_at or self.state.began
        since = cut_at if text.may_have_reached else text.arrived
        return max(since, vm.answered_at) + self.settings.limits.vm_away_limit_s

    def is_late(self, vm: VmState, text: Text) -> bool:
        return self._deadline(vm, text) <= self.clock.now()

    async def _expire(self, vm: VmState, text: Text) -> None:
        """Its time is over; those it is over for too share the notice."""
        if text.may_have_reached:
            await self._finish(vm, [text], "silent", s=self.settings.limits.vm_away_limit_s)
        else:
            late = [one for one in vm.unreached() if self.is_late(vm, one)]
            await self._finish(vm, late, "expired")


# --- Taking in ---
#
# A text is judged, its verdict stored with its SID, then done.

COMMAND = re.compile(r"\s*cockpit(?: (\S+))?\s*", re.IGNORECASE)
VERBS = ("status", "stop", "new", "restart", "queue", "cancel", "lock")
# Twilio answers these itself, when nothing else is said; YES only to who opted out.
KEYWORDS = {
    word: kind
    for kind, *words in (
        ("STOP", "STOP", "STOPALL", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT"),
        ("START", "START", "UNSTOP", "YES"),
        ("HELP", "HELP", "INFO"),
    )
    for word in words
}
PAIRING_CODE = re.compile(r"(?:[\s\u2010-\u2015-]*[0-9]){6}[\s\u2010-\u2015-]*")
ASK_FOR_CODE_EVERY_S = 3600.0
CODES_AT_ONCE = 10
# After so many wrong ones none counts for an hour, doubled up to a day.
CLOSED = Backoff(base_s=3600, cap_s=86_400)
NOTE_S = 1.0


@dataclass(slots=True, eq=False)
class Verdict:
    """What becomes of a text."""

    outcome: str
    vm: VmState
    text: Text | None = None  # for the VM
    reply: str = ""  # with the webhook's answer
    words: Sequence[str] = ()  # by the send lane, each a message of its own
    values: Json = field(default_factory=dict)  # of the VM
    then: Callable[[VmState], Coroutine[Any, Any, None]] | None = None  # once it is stored


def pairing_code_in(body: str) -> str:
    """The six digits that a text is, but for spaces and dashes, or nothing."""
    return re.sub("[^0-9]", "", body) if PAIRING_CODE.fullmatch(body) else ""


@dataclass(kw_only=True, eq=False)
class PhoneDoor(Part):
    """Whose phone it is: the sign-up page's code pairs it, a lock undoes that.

    Both hold at once, and are on disk before a SID is. A code is neither kept nor passed on.
    """

    keyring: Keyring
    twilio: TwilioClient
    sender: Sender
    stamp: Callable[[str], Awaitable[None]]  # (vm_id): tells Fly
    closed: set[str] = field(init=False)  # VMs that may be accepting no code

    def __post_init__(self) -> None:
        routes = self.routes.routes.values()
        self.closed = {route.vm_id for route in routes if route.closed_until}

    async def judge(
        self, message: InboundMessage, vm: VmState, route: Route, command: str
    ) -> Verdict | None:
        """Of a text that goes no further than here; raises StoreError."""
        code = pairing_code_in(message.body)
        if route.is_paired and not (code and self.keyring.fits(code, route)):
            # Dated before the pairing, it may have come during a lock.
            is_early = 0 < message.dated < (parse_utc(route.paired_at) or 0.0)
            return Verdict("before_pairing", vm) if is_early else None
        if route.was_paired and command in ("status", "help"):
            return None
        outcome = await self._try(message, code, vm) if code else "unpaired"
        if outcome == "paired":
            return Verdict(outcome, vm, words=[CONNECTED])
        now = self.clock.now()
        was_asked = now - vm.asked_for_code_at < ASK_FOR_CODE_EVERY_S
        if was_asked or vm.opted_out.get(message.channel):
            return Verdict(outcome, vm)
        return Verdict(outcome, vm, words=[TEXT_THE_CODE], values={"asked_for_code_at": now})

    async def _try(self, message: InboundMessage, code: str, vm: VmState) -> str:
        is_counted = await self.state.store.known([message.sid])
        found = self.routes.find(vm.vm_id)
        if is_counted or found is None or self._is_closed(found[1]):
            return "unpaired"
        phone, route = found
        if not self.keyring.fits(code, route):
            await self._count(phone, route)
            return "wrong_code"
        if route.is_paired:  # on disk too?
            await self.routes.commit()
            return "paired"
        # Our time by Twilio's clock is up to a second behind it.
        at = utc_millis(message.dated or self.twilio.now() + 1)
        await self._put("phone_paired", phone, route, f"{route.pairing_number}:paired", at)
        return "paired"

    async def _count(self, phone: str, route: Route) -> None:
        """Each ten wrong ones close the VM, twice as long as the last."""
        count, until = route.wrong_codes + 1, ""
        if count % CODES_AT_ONCE == 0:
            until = utc_millis(self.clock.now() + CLOSED.ceiling(count // CODES_AT_ONCE))
            self.closed.add(route.vm_id)
            log_warning("pairing_closed", vm_id=route.vm_id, until=until)
        self.routes.put(phone, replace(route, wrong_codes=count, closed_until=until))
        await self.routes.commit()

    async def _put(self, event: str, phone: str, route: Route, pairing: str, at: str) -> None:
        """Raises StoreError; the write is tried on."""
        changed = replace(route, pairing=pairing, paired_at=at, wrong_codes=0, closed_until="")
        self.routes.put(phone, changed)
        log_event(event, vm_id=route.vm_id, phone=mask_phone(phone))
        await self.routes.commit()
        self.tasks.start(self._tell_fly(route.vm_id))

    async def _tell_fly(self, vm_id: str) -> None:
        try:
            await self.stamp(vm_id)
        except UpstreamError as error:  # the next sweep does
            log_warning("stamp_failed", vm_id=vm_id, error=str(error))

    async def date_adopted(self, message: InboundMessage) -> None:
        """A lost disk took the time of a pairing along: the list may tell it."""
        route, code = self.routes.routes.get(message.phone), pairing_code_in(message.body)
        is_undated = route and route.is_paired and not route.paired_at
        if route and code and is_undated and self.keyring.fits(code, route):
            await self.routes.update(route.vm_id, paired_at=utc_millis(message.dated))

    def _is_closed(self, route: Route) -> bool:
        return (parse_utc(route.closed_until) or 0.0) > self.clock.now()

    def closed_vms(self) -> list[str]:
        """Which VMs accept no code for now."""
        routes = filter(None, map(self.routes.of, self.closed))
        self.closed = {route.vm_id for route in routes if self._is_closed(route)}
        return sorted(self.closed)

    async def lock(self, vm: VmState) -> None:
        """Until the new code comes; raises StoreError, and is locked then too."""
        if found := self.routes.find(vm.vm_id):
            phone, route = found
            now = utc_millis(self.twilio.now()) if route.is_paired else ""
            pairing, at = f"{route.pairing_number + 1}:unpaired", route.paired_at or now
            await self._put("phone_locked", phone, route, pairing, at)
            if route.is_paired:
                await self.sender.notify(vm, LOCKED)
        await self.sender.drop(vm)


@dataclass(kw_only=True, eq=False)
class OwnerCommands(Part):
    """What an owner asks the gateway by text: it works with the VM dead too.

    What is to be done is owed from its SID on, until it is done and told.
    """

    sender: Sender
    watch: Watch
    vms: VmClient
    door: PhoneDoor
    runner: Runner
    restart: Callable[[str], Awaitable[None]]  # returns once it is on disk; raises Refusal

    @staticmethod
    def match(body: str) -> str:
        """The command that a text is, or nothing."""
        found = COMMAND.fullmatch(body)
        verb = (found[1] or "").lower() if found else ""
        return verb if not found or verb in VERBS else "help"

    async def judge(self, message: InboundMessage, vm: VmState, command: str) -> Verdict:
        log_event("owner_command", vm_id=vm.vm_id, message_sid=message.sid, command=command)
        note = await self.watch.note(vm, NOTE_S) if command == "status" else ""
        says, waiting = functools.partial(Verdict, "command", vm), vm.queued()
        # By Twilio's list, of whole seconds, it may come late.
        is_late = any(text.arrived > message.arrived + 1 for text in vm.waiting)
        match "queue" if is_late and command in ("stop", "cancel") else command:
            case "status":
                now = f"{self._condition(vm)} {self._now(vm, note)}"
                return says(words=[f"{now} {len(waiting)} waiting."])
            case "queue":
                lines = [f"{place}. {quoted(text)}" for place, text in enumerate(waiting, 1)]
                return says(words=["\n".join([self._now(vm), *lines])])
            case "cancel":
                cancel = functools.partial(self.do_cancel, texts=waiting)
                return says(values={"owes_cancel": True}, then=cancel)
            case "restart":
                return says(values={"owes_restart": True}, then=self.do_restart)
            case "stop":
                sid, first = vm.stopped_sid, next(iter(vm.waiting), None)
                if not vm.owes_stop:  # else it is under way
                    sid = first.sid if first and (vm.running or first.may_have_reached) else ""
                return says(values={"owes_stop": True, "stopped_sid": sid}, then=self.do_stop)
            case "lock":
                if not await self.state.store.known([message.sid]):
                    await self.door.lock(vm)
                return says(values={"reply_to": vm.reply_to})
            case "new":
                sids = [text.sid for text in vm.waiting]
                anew = [*(sid for sid in vm.new_sids if sid in sids), ""]
                return says(words=[NEXT_IS_NEW], values={"new_sids": anew})
        return says(words=[COMMANDS_HELP])

    def _now(self, vm: VmState, note: str | None = None) -> str:
        """What runs; with a `note` for how long too, and what it is doing."""
        now = NOTHING_RUNS
        if text := vm.running:
            now = about("Running: {texts}", text)
            if note is not None:
                age_s = self.clock.now() - text.trace.reached["handed_over"]
                now += f", for {age_s:.0f} s."
        elif vm.waiting and vm.waiting[0].busy_since is not None:
            now = "Waiting for the command before it."
        return f"{now[:-1]} ({note})." if note else now

    def _condition(self, vm: VmState) -> str:
        route = self.routes.routes.get(vm.phone)
        if route is None or route.state == "failed":
            return VM_GONE
        if not route.is_paired:
            return "Your VM is locked."
        if vm.is_paused:
            return "Your VM is being restarted."
        if vm.away_since is not None:
            return f"Your VM has been away for {max(0, int(self.clock.now() - vm.away_since))} s."
        return f"Your VM is {route.state}."

    async def do_cancel(self, vm: VmState, texts: Sequence[Text]) -> None:
        """Drop those of these that still wait."""
        vm.owes_cancel = False
        texts = [text for text in vm.queued() if text in texts]
        for text in texts:
            vm.waiting.remove(text)
        if texts:
            await self.sender.finish(vm, texts, [dropped(texts)], "cancelled")
        else:
            await self.sender.notify(vm, f"Nothing is waiting. {self._now(vm)}", vm.put())

    async def do_stop(self, vm: VmState) -> None:
        """End what the VM runs, and say so; what waits is kept."""
        reply = await self._stop(vm)
        if reply != STOPPED:
            vm.stopped_sid = ""
        vm.owes_stop = False
        await self._tell(vm, reply)

    async def _stop(self, vm: VmState) -> str:
        route = self.routes.of(vm.vm_id)
        if route is None or route.state != "ready":
            return NOTHING_RUNS
        try:
            # Named, so that no later text is ended in its place.
            stopped = await self.vms.cancel(route, vm.stopped_sid)
        except VmAway:
            return NOT_STOPPED
        except VmFailed as error:
            return CANNOT_STOP if error.status in (404, 405, 501) else NOT_STOPPED
        return NOTHING_RUNS if stopped is False else STOPPED

    async def do_restart(self, vm: VmState) -> None:
        """Begin one, whose own record takes over from ours, and say so."""
        route, reply = self.routes.of(vm.vm_id), RESTART_BEGUN
        try:
            if route is None or route.change != "restart":  # else a start found its record
                await self.restart(vm.vm_id)
        except (Refusal, StoreError) as error:
            reply = f"Not restarted: {error}"
        vm.owes_restart = False
        await self._tell(vm, reply)

    async def _tell(self, vm: VmState, reply: str) -> None:
        await self.sender.notify(vm, reply, vm.put())
        self.runner.start(vm)


def keyword_of(message: InboundMessage, vm: VmState) -> str:
    """STOP, START, HELP: Twilio answers this text itself; or nothing."""
    word = message.body.strip().upper()
    if word == "YES" and not vm.opted_out.get(message.channel):
        return ""
    return KEYWORDS.get(message.opt_out.upper()) or KEYWORDS.get(word, "")


@dataclass(kw_only=True, eq=False)
class Inbox(Part):
    """Takes texts in: once, if allowed, stored before the answer."""

    sender: Sender
    runner: Runner
    commands: OwnerCommands
    door: PhoneDoor
    # When what of which phone came or was told (monotonic).
    times: Recent[deque[float]] = field(default_factory=lambda: Recent(20_000))

    async def accept(self, message: InboundMessage) -> str:
        """Returns the webhook's reply; raises Refusal and StoreError."""
        return await self._conclude(message, await self._judge(message))

    async def accept_fetched(self, messages: Sequence[InboundMessage]) -> bool:
        """The same of Twilio's list, oldest first; False: some have no room yet."""
        for message in messages:
            await self.door.date_adopted(message)
        full: set[str] = set()  # phones: behind, only STOP and START count
        for message in messages:
            if message.phone in full and message.body.strip().upper() not in KEYWORDS:
                continue
            verdict = await self._judge(message)
            if verdict.outcome == "queue_full":
                full.add(message.phone)
            else:
                await self._conclude(message, verdict)
        return not full

    async def _conclude(self, message: InboundMessage, verdict: Verdict) -> str:
        """Store a SID with what becomes of its text, then see to that.

        Returns the webhook's reply, that of the first time; raises StoreError.
        """
        vm, text, outcome = verdict.vm, verdict.text, verdict.outcome
        if vm.opted_out.get(message.channel):
            verdict.reply, verdict.words = "", ()
        outs = [self.sender.outbound(vm, split_text(words)) for words in verdict.words]
        known: str | None = ""
        try:
            known = await self._store(message, verdict, outs)
        finally:
            if text:
                vm.accepting -= 1
            if known is not None:
                self.runner.start(vm)  # a verb that is not stored holds up no text
        self.metrics.texts.add(outcome if known is None else "repeated")
        if known is not None:
            return known
        for out in outs:
            self.sender.queue(vm, out)
        if text:
            await self._enqueue(vm, text)
        elif outcome not in ("command", "keyword"):
            self._note_refused(message, outcome)
        if verdict.then:
            self.tasks.start(verdict.then(vm))
        return verdict.reply

    async def _store(
        self, message: InboundMessage, verdict: Verdict, outs: Sequence[Outbound]
    ) -> str | None:
        """None when the SID is new, else the reply of that time."""
        changes = [new.added() for new in (*outs, verdict.text) if new]
        try:
            if outs or verdict.values:
                return await self.state.once(verdict.vm, message, *changes, **verdict.values)
            seen = message.sid, message.arrived, verdict.reply
            return await self.state.store.commit_once(*seen, *changes)
        except StoreError:
            self.metrics.texts.add("not_stored")
            raise

    def _note_refused(self, message: InboundMessage, outcome: str) -> None:
        trace = self.state.trace(message.sid, "", self.clock.now())
        trace.outcome = outcome
        self.state.remember(trace)
        phone = mask_phone(message.sender)
        log_event("text_refused", message_sid=message.sid, phone=phone, outcome=outcome)

    async def _enqueue(self, vm: VmState, text: Text) -> None:
        self.state.remember(text.trace)
        text.trace.reached["stored"] = self.clock.now()
        self.metrics.note_text()
        vm.last_text = text.arrived
        vm.waiting.append(text)
        self.runner.start(vm)
        if vm.closing_notice:  # torn down while it was stored
            parts = split_text(self.sender.closing_words(vm.closing_notice, [text]))
            await self.sender.finish(vm, [text], parts, "gone")

    # Judging

    async def _judge(self, message: InboundMessage) -> Verdict:
        """Raises StoreError, and Refusal of what is to be fetched later."""
        phone, limits = message.phone, self.settings.limits
        if self.state.is_draining:
            reason = "this gateway is shutting down; the text will be fetched later"
            raise Refusal("draining", reason)
        route = self.routes.routes.get(phone)
        vm = self.state.vm(route.vm_id, phone) if route else VmState(vm_id="", phone=phone)
        if word := keyword_of(message, vm):
            return await self._judge_keyword(message, vm, word)
        if route is None:
            return self._judge_stranger(vm)
        usual = message.recipient in ("", message.channel + self.settings.twilio.phone_number)
        address = Address(message.channel, "" if usual else message.recipient)
        command = self.commands.match(message.body)
        if stopped := await self.door.judge(message, vm, route, command):
            if stopped.words:
                vm.reply_to = address
            return stopped
        limit = 0 if message.is_fetched else limits.text_limit
        if limit and not self._is_within(limit, 60, phone):
            is_told = self._is_within(1, 60, f"told {phone}")
            return Verdict("too_fast", vm, reply=TOO_FAST.format(n=limit) if is_told else "")
        if command:
            vm.reply_to = address
            return await self.commands.judge(message, vm, command)
        if route.state == "failed":
            vm.reply_to = address
            return Verdict("gone", vm, words=[self.sender.closing_words(VM_GONE, [message])])
        if len(vm.waiting) + vm.accepting - (vm.runner is not None) >= limits.queue_limit:
            reply = about(QUEUE_FULL, message, n=limits.queue_limit)
            return Verdict("queue_full", vm, reply=reply)
        return self._take(message, route, vm, address)

    async def _judge_keyword(self, message: InboundMessage, vm: VmState, word: str) -> Verdict:
        """Record an opt-out or opt-in; Twilio replies."""
        verdict, channel, at = Verdict("keyword", vm), message.channel, message.arrived
        # What the list tells late does not undo what was said since.
        is_late = message.is_fetched and at < vm.opted_at.get(channel, 0.0)
        is_known = await self.state.store.known([message.sid])
        if vm.vm_id and word != "HELP" and not (is_late or is_known):
            is_out = word == "STOP"
            verdict.values = {
                "opted_out": {**vm.opted_out, channel: is_out},
                "opted_at": {**vm.opted_at, channel: at},
                "error": vm.error if is_out else "",
            }
            event = "opted_out" if is_out else "opted_in"
            log_event(event, vm_id=vm.vm_id, message_sid=message.sid)
        return verdict

    def _judge_stranger(self, vm: VmState) -> Verdict:
        if self.routes.closed_because:
            raise Refusal("fly_unavailable", self.routes.closed_because)
        url = self.settings.gateway.onboarding_url
        if not PHONE.fullmatch(vm.phone) or vm.phone == self.settings.twilio.phone_number:
            return Verdict("ignored", vm)
        is_told = url and self._is_within(1, 3600, f"invited {vm.phone}")
        return Verdict("unknown", vm, reply=NO_VM_YET.format(url=url) if is_told else "")

    def _is_within(self, most: int, every_s: float, what: str) -> bool:
        """Whether there was less of this in so many seconds; then it counts."""
        now = self.clock.monotonic()
        times = self.times.get(what) or deque(maxlen=most)
        if len(times) == most and times[0] > now - every_s:
            return False
        times.append(now)
        self.times.put(what, times, now)
        return True

    def _take(
        self, message: InboundMessage, route: Route, vm: VmState, address: Address
    ) -> Verdict:
        values: Json = {} if vm.reply_to == address else {"reply_to": address}
        vm.reply_to = address
        text = Text(
            sid=message.sid,
            vm_id=vm.vm_id,
            body=message.body,
            arrived=message.arrived,
            reply_to=address,
            media=message.media,
            # The hand-over follows at once: one transaction tells both.
            handed_over=self.runner.is_free(vm, route),
            trace=self.state.trace(message.sid, vm.vm_id, message.arrived),
        )
        words = [PICTURE_ELSEWHERE] if self.sender.pictures_elsewhere(text) else []
        if "" in vm.new_sids:
            values["new_sids"] = [sid or text.sid for sid in vm.new_sids]
        if route.state == "provisioning" and not vm.was_told_of_setup:
            words.append(SETTING_UP)
            values["was_told_of_setup"] = True
        if route.state == "asleep" and not self.runner.is_late(vm, text):
            self.runner.waker.begin(vm)  # beside the fsync
        vm.accepting += 1
        return Verdict("accepted", vm, text, words=words, values=values)


# --- Relay ---

# Texts of a VM without a route are kept: Fly may tell whose it is.
UNROUTED_S = 3600.0
VM_MESSAGE_LIMITS = ((60.0, 40), (86_400.0, 500))  # seconds, how many of Twilio's messages


@dataclass(kw_only=True, eq=False)
class Relay(Part):
    """The relay as one: what happens to VMs, its start and its end."""

    twilio: TwilioClient
    runner: Runner
    sender: Sender
    commands: OwnerCommands
    is_started: bool = False

    @property
    def vms(self) -> dict[str, VmState]:
        return self.state.vms

    @property
    def is_draining(self) -> bool:
        return self.state.is_draining

    # Start and end

    async def load(self) -> None:
        """Read what was in flight; `start` sets it going. Raises StoreError."""
        for sid in await self.state.load():
            self.twilio.note_sent(sid)
        for vm in list(self.vms.values()):
            if vm.owes_cancel and vm.phone:
                await self.commands.do_cancel(vm, vm.unreached())
            route, undone = self.routes.of(vm.vm_id), self.routes.undo.get(vm.vm_id, {})
            if undone or (route and route.state == "failed" and vm.waiting):
                await self.vm_gone(vm.vm_id, vm.phone, str(undone.get("reason")))
            if any(text.may_have_reached for text in vm.waiting):
                vm.handed_over_at = self.clock.monotonic()
            if vm.waiting and not vm.phone:
                self.tasks.start(self._forget_unrouted(vm))

    def start(self) -> None:
        self.is_started = True
        for vm in self.vms.values():
            self.tasks.start(self._start_vm(vm))

    async def _start_vm(self, vm: VmState) -> None:
        """What is owed comes before its texts; a route may yet be found."""
        if vm.owes_stop and vm.phone:
            await self.commands.do_stop(vm)
        if vm.owes_restart and vm.phone:
            await self.commands.do_restart(vm)
        self.runner.start(vm)
        self.sender.start(vm)
        self.state.retire(vm)

    async def vm_adopted(self, vm_id: str, phone: str) -> None:
        if vm := self.vms.get(vm_id):
            vm.phone = phone
            if vm.owes_cancel:
                await self.commands.do_cancel(vm, vm.unreached())
            if self.is_started:  # else `start` does it
                self.tasks.start(self._start_vm(vm))

    async def _forget_unrouted(self, vm: VmState) -> None:
        await self.clock.sleep(UNROUTED_S)
        if not self.routes.find(vm.vm_id):
            log_warning("texts_of_gone_vm", vm_id=vm.vm_id, texts=len(vm.waiting))
            self.state.store.note(*(text.ended() for text in vm.waiting))
            vm.waiting.clear()
            vm.closing_notice = VM_GONE
            self.state.retire(vm)

    async def drain(self) -> None:
        """Hand over nothing more; wait for what is out (bounded by the caller)."""
        vms = self.vms.values()
        for vm in vms:
            if vm.runner and not vm.is_handing_over:
                vm.runner.cancel()
        while lanes := [lane for vm in vms for lane in (vm.runner, vm.sender) if lane]:
            await asyncio.wait(lanes)

    # What happens to VMs

    async def vm_ready(self, vm_id: str, welcome: bool = False) -> None:
        """What waited for it runs now."""
        if found := self.routes.find(vm_id):
            vm = self.state.vm(vm_id, found[0])
            vm.closing_notice = ""  # it was gone, and came back
            vm.answered_at = self.clock.now()
            if welcome and found[1].was_paired:
                await self.sender.notify(vm, WELCOME)
            self.runner.start(vm)

    async def vm_gone(self, vm_id: str, phone: str, reason: str) -> None:
        """Nothing of a VM outlives it: its owner reads what was not run.

        `reason`: `failed` to be set up, `torn_down`, or `vanished`.
        """
        vm = self.state.vm(vm_id, phone)
        vm.closing_notice = SET_UP_FAILED if reason == "failed" else VM_GONE
        await self.runner.stop(vm)
        vm.away_since = None
        texts, route = list(vm.waiting), self.routes.routes.get(phone)
        words = self.sender.closing_words(vm.closing_notice, texts)
        if texts:
            await self.sender.finish(vm, texts, split_text(words), "gone")
        elif reason == "vanished" and route and route.was_paired:
            await self.sender.notify(vm, words)
        self.state.retire(vm)

    # What VMs say

    async def accept_vm_message(
        self, vm_id: str, phone: str, words: str, images: Sequence[str], key: str = ""
    ) -> str:
        """A VM texts its own owner, once for each key; returns the message's id.

        Raises Refusal and StoreError.
        """
        vm, route = self.state.vm(vm_id, phone), self.routes.routes.get(phone)
        if self.is_draining:
            raise Refusal("draining", "this gateway is shutting down; try again in a moment")
        wanted = "START" if vm.opted_out.get(vm.reply_to.channel) else ""
        if route and not route.was_paired:
            wanted = "the pairing code"
        if wanted:
            raise Refusal("wrong_state", f"nothing is sent until this VM's phone texts {wanted}")
        parts = split_text(words) if words else []
        counted = self._count_vm_message(vm, len(parts) + len(images))
        out = self.sender.outbound(vm, parts, images=images, id=f"v-{self.clock.random_id()}")
        seen = f"{vm_id} {key or out.id}", self.clock.now(), out.id
        known = await self.state.store.commit_once(*seen, out.added(), vm.put())
        if known is not None:
            vm.vm_messages.remove(counted)
            return known
        if route and route.state == "asleep":
            self.tasks.start(self._look(vm_id))
        vm.still_at = max(vm.still_at, self.clock.monotonic() + STILL_EVERY_S)
        self.sender.queue(vm, out)
        self.metrics.vm_messages.add()
        return out.id

    async def _look(self, vm_id: str) -> None:
        """A sleeper that speaks was woken, or sent this as it froze."""
        with suppress(UpstreamError):  # a sweep sees it too
            await self.runner.waker.look(vm_id)

    def _count_vm_message(self, vm: VmState, cost: int) -> tuple[float, int]:
        """Raises Refusal when it would cause too many of Twilio's messages."""
        now = self.clock.now()
        for seconds, most in VM_MESSAGE_LIMITS:
            recent = [(at, count) for at, count in vm.vm_messages if now - seconds < at <= now]
            if sum(count for _, count in recent) + cost > most:
                limit = f"at most {most} messages in {seconds:g} s, parts and pictures counted"
                wait_s = int(recent[0][0] + seconds - now) + 1
                raise Refusal("too_many", limit, retry_after_s=wait_s)
        vm.vm_messages = [*recent, (now, cost)]
        return now, cost

    # Questions

    def waiting(self) -> int:
        return sum(len(vm.waiting) for vm in self.vms.values())

    def oldest_waiting_s(self) -> float:
        arrived = [vm.waiting[0].arrived for vm in self.vms.values() if vm.waiting]
        return max(0.0, self.clock.now() - min(arrived, default=float("inf")))

    def sending(self) -> int:
        return sum(len(vm.outbox) for vm in self.vms.values())

    def oldest_sending_s(self) -> float:
        created = [vm.outbox[0].created_at for vm in self.vms.values() if vm.outbox]
        return max(0.0, self.twilio.now() - min(created, default=float("inf")))

    def away_states(self) -> Counter[str]:
        """VMs that are away, by their routes' states."""
        away = (vm.vm_id for vm in self.vms.values() if vm.away_since is not None)
        return Counter(route.state for route in map(self.routes.of, away) if route)

    def may_be_running(self, vm_id: str) -> bool:
        """Whether a restart might cut a command that was handed over."""
        vm, now = self.vms.get(vm_id), self.clock.monotonic()
        timeout_s = self.runner.vms.command_timeout_s
        return vm is not None and (vm.is_handing_over or now < vm.handed_over_at + timeout_s)


@dataclass(kw_only=True, eq=False)
class Backfill(Part):
    """Fetches texts that came while nobody listened, to the same door."""

    twilio: TwilioClient
    inbox: Inbox
    long_at: float = NEVER  # monotonic: the last long look

    PAGES = 5000
    OVERLAP_S = 900.0
    LONG_S = 86_400.0  # lists have been seen hours late
    LONG_EVERY_S = 3600.0

    async def at_start(self) -> None:
        """Before the door opens: whatever Twilio tells within 5 s."""
        with suppress(TimeoutError):
            async with self.clock.time_limit(5):
                # What it is just storing, no lane would know of.
                await asyncio.shield(self.tasks.start(self.once()))

    async def run(self) -> None:
        """Again every BACKFILL_S, until Twilio says that this account may not list."""
        while not self.twilio.cannot_list:
            await self.clock.sleep(self.settings.limits.backfill_s)
            await self.once()

    async def once(self) -> None:
        """One look at the lists of our number and of its WhatsApp sender."""
        began, now, marks = self.clock.monotonic(), self.twilio.now(), self.state.marks
        is_long = began - self.long_at >= self.LONG_EVERY_S
        since = min(marks.get("listed", now), now) - self.OVERLAP_S
        # Never from before this database was begun less VM_AWAY_LIMIT_S.
        first = min(marks["begun"], now) - self.settings.limits.vm_away_limit_s
        since = max(first, min(since, now - self.LONG_S) if is_long else since)
        number = self.settings.twilio.phone_number
        try:
            found = await self._list(number, since) + await self._list(WHATSAPP + number, since)
            found.sort(key=lambda message: message.arrived)
            is_whole = await self.inbox.accept_fetched(found)
        except UpstreamRejected as error:
            self.twilio.give_up_listing(error)
        except Exception as error:  # one that nobody foresaw does not end all looking
            trace = None if isinstance(error, CockpitError) else error
            log_warning("backfill_failed", error=str(error), exc_info=trace)
        else:
            # Where routes are missing, texts are not known by them.
            if is_whole and not self.routes.closed_because:
                change = self.state.set_mark("listed", now)
                if is_long:  # as a start's first look is: it needs to know it no better
                    self.long_at = began
                    self.state.store.note(change)

    async def _list(self, recipient: str, since: float) -> list[InboundMessage]:
        """Unknown texts to this address since then; Twilio's filter is on its own date.

        Raises UpstreamError and StoreError.
        """
        query = {"To": recipient, "DateSent>": utc_seconds(since)}
        url: URL | None = self.twilio.first_page(query)
        new: dict[str, Json] = {}
        for _ in range(self.PAGES):
            if url is None:
                break
            listed, url = await self.twilio.list_page(url)
            ours = {str(one.get("sid")): one for one in listed if self._is_ours(one, since)}
            known = await self.state.store.known(list(ours))
            new |= {sid: entry for sid, entry in ours.items() if sid not in known}
        else:
            raise UpstreamUnreadable("twilio", "list messages", "a list without an end")
        oldest_first = reversed(new.values())
        return [await self._message(entry, recipient) for entry in oldest_first]

    def _is_ours(self, entry: Json, since: float) -> bool:
        """Whether it is to us, young, and not older than its sender's route."""
        at, is_inbound = listed_at(entry), entry.get("direction") == "inbound"
        route = self.routes.routes.get(str(entry.get("from")).removeprefix(WHATSAPP))
        if at is None or route is None or not (is_inbound and entry.get("sid")):
            return False
        route_made = parse_utc(route.created_at) or 0.0
        return at >= since - 1 and int(at + self.twilio.api.ahead_s) >= route_made

    async def _message(self, entry: Json, recipient: str) -> InboundMessage:
        """One without its pictures, rather than one that holds up others."""
        sid, dated = str(entry["sid"]), listed_at(entry) or 0.0
        media: Sequence[Sequence[str]] = ()
        if str(entry.get("num_media") or "0") != "0":
            try:
                media = await self.twilio.media_of(sid)
            except UpstreamRejected as error:
                log_warning("media_not_listed", message_sid=sid, error=str(error))
        return InboundMessage(
            sid=sid,
            sender=str(entry.get("from")),
            recipient=recipient,
            body=str(entry.get("body") or ""),
            arrived=min(dated + self.twilio.api.ahead_s, self.clock.now()),
            media=media,
            is_fetched=True,
            dated=dated,
        )


# --- Fleet ---

# How long a running text has to end before a change.
PATIENCE_S = {"restart": 0.0, "rotate": 20.0, "upgrade": float("inf")}
AT_ONCE = 20
SICK_SWEEPS = 3
RESTART_AGAIN_S = 600.0
ADOPT_AT_START_S = 3.0
ADOPT_LATER = Backoff(base_s=2, cap_s=300)
NOT_ADOPTED = "routes.json is empty, and what Fly holds is not adopted yet"
LOOK_FOR_IDLE_S = 5.0
ASK_IDLE_AGAIN_S = 30.0
SUSPEND_AGAIN_S = 3600.0
ROUTES_A_TURN = 1000
# What a machine that takes the place of ours changes of a route.
AT_FLY = ("machine_id", "vm_url", "region", "image", "state", "key_id")


@dataclass(kw_only=True, eq=False)
class VmChanges:
    """Changes VMs while their texts wait; each is on disk before Fly is asked."""

    settings: Settings
    clock: Clock
    routes: RouteStore
    fly: FlyClient
    blueprint: Blueprint
    builder: Builder
    provisioner: Provisioner
    relay: Relay
    waker: Waker
    tasks: Tasks
    running: dict[str, Work]

    def begin(self, vm_id: str, what: str, **credentials: str) -> Work:
        """Take a change on; raises Refusal when the VM is not ready for it."""
        phone, route = self.check(vm_id)
        route = replace(route, change=what)
        self.routes.put(phone, route)
        return self._start(phone, route, credentials)

    def check(self, vm_id: str) -> tuple[str, Route]:
        """Of a VM that can be changed now; raises Refusal."""
        record, found = self.provisioner.record(vm_id), self.routes.find(vm_id)
        vm_id, state = record["vm_id"], record["state"]
        if work := self.running.get(vm_id):
            state = f"in the middle of its {work.what}"
        if found is None or state not in ("ready", "asleep"):
            reason = f"{vm_id} is {state}; this needs it to be ready or asleep"
            raise Refusal("wrong_state", reason)
        if self.provisioner.is_draining:
            raise Refusal("draining", "this gateway is shutting down; try again in a moment")
        return found

    def resume_all(self) -> None:
        """At start: end what an earlier process began."""
        for phone, route in self.routes.routes.items():
            if route.change in PATIENCE_S:
                self._start(phone, route, {})

    def _start(self, phone: str, route: Route, credentials: Mapping[str, str]) -> Work:
        vm_id, what = route.vm_id, route.change
        log_event(f"{what}_begun", vm_id=vm_id)
        self.relay.state.vm(vm_id, phone).is_paused = True
        change = Work(vm_id=vm_id, phone=phone, what=what, credentials=credentials)
        self.running[vm_id] = change
        change.task = self.tasks.start(self._run(change))
        return change

    async def _run(self, change: Work) -> None:
        """Cancelled by a shutdown it stays on disk: the next start ends it."""
        vm_id, what, answered_at = change.vm_id, change.what, 0.0
        vm, runner = self.relay.state.vm(vm_id, change.phone), self.relay.runner
        try:
            await self.routes.commit()
            limits = self.settings.limits
            await runner.pause(vm, min(PATIENCE_S[what], limits.vm_command_timeout_s))
            # A restart would only resume it.
            if self.builder.route(change).state == "asleep":
                await self.waker.rouse(vm, limits.provision_timeout_s)
                await self.waker.note_awake(vm_id)
            await self._do(change)
            answered_at = self.clock.now()
            await self._end(change, "")
        except CockpitError as error:
            refusal = refusal_for(error)
            await self._end(change, f"{what}: {refusal.detail}")
            raise refusal from error
        finally:
            self.running.pop(vm_id, None)
            if not change.is_torn_down:
                await runner.resume(vm, answered_at=answered_at)

    async def _end(self, change: Work, trouble: str) -> None:
        event = f"{change.what}_{'failed' if trouble else 'done'}"
        log_event(event, vm_id=change.vm_id, error=trouble)
        with suppress(StoreError):
            await self.routes.update(change.vm_id, change="", old_image="", last_error=trouble)

    async def _do(self, change: Work) -> None:
        match change.what:
            case "restart":
                machine = await self._machine(change)
                await self.fly.restart_machine(change.vm_id, machine)
                # Fly may still show the old `started`: only a later event counts.
                await self.builder.wait_ready(change, machine, machine.last_event)
            case "rotate":
                await self.builder.wait_ready(change, await self._replace_config(change))
            case "upgrade":
                await self._upgrade(change)

    async def _machine(self, change: Work) -> Machine:
        machine = await self.fly.get_machine(change.vm_id, self.builder.route(change).machine_id)
        if not machine.host_ok or not machine.config:
            reason = "Fly does not reach the host this VM is on; try again later"
            raise Refusal("fly_unavailable", reason)
        return machine

    async def _replace_config(self, change: Work, image: str = "") -> Machine:
        """Set secrets, ours renewed, and send the config back: it boots anew."""
        vm_id, blueprint = change.vm_id, self.blueprint
        machine = await self._machine(change)
        values = {**change.credentials, **blueprint.own_secrets(vm_id)}
        version = await self.fly.set_secrets(vm_id, values)
        stamp = blueprint.stamp(change.phone, self.builder.route(change))
        config = {
            **machine.config,
            **({} if machine.config.get("mounts") else blueprint.rootfs()),
            "image": image or machine.image,
            "metadata": {**machine.metadata, **stamp},
        }
        updated = await self.fly.update_machine(vm_id, machine, config, version)
        image = image or self.builder.route(change).image
        await self.routes.update(vm_id, key_id=blueprint.keyring.current_id, image=image)
        return updated

    async def _upgrade(self, change: Work) -> None:
        """Move to the present VM_IMAGE, and back when it is not healthy.

        What to go back to (the very build, if tags are equal) is on disk, and all is begun
        anew after a kill.
        """
        vm_id, image = change.vm_id, self.settings.vm.image
        old = self.builder.route(change).old_image
        if not old:
            machine = await self._machine(change)
            old = machine.image if machine.image != image else machine.build or image
            await self.routes.update(vm_id, old_image=old)
        updated = await self._replace_config(change, image)
        try:
            await self.builder.wait_ready(change, updated)
        except CockpitError as error:
            about = {"image": image, "back_to": old, "error": str(error)}
            log_warning("upgrade_undone", vm_id=vm_id, **about)
            await self.builder.wait_ready(change, await self._replace_config(change, old))
            reason = f"{vm_id} did not become healthy on {image}; it is back on {old}"
            raise Refusal("vm_unhealthy", reason) from error


class Action(NamedTuple):
    """What a sweep wants done; Fly is asked once more before it is."""

    kind: str
    vm_id: str
    phone: str = ""
    machine_id: str = ""


def compare(
    apps: set[str],
    machines: Sequence[Machine],
    routes: Mapping[str, Route],
    blueprint: Blueprint,
    *,
    busy: Collection[str] = (),  # they change, wake, fall asleep, go, or just went
    suspects: Collection[str] = (),  # their last call failed
    is_whole: bool = True,  # else nothing follows from what is missing
) -> Iterator[Action]:
    """What is to be done when Fly shows these, without any I/O."""
    of_app: dict[str, list[Machine]] = {app: [] for app in apps}
    for machine in machines:
        of_app.setdefault(machine.app, []).append(machine)
    unknown = of_app.keys() - busy
    for phone, route in routes.items():
        vm_id, is_given_up = route.vm_id, route.state == "failed"
        unknown.discard(vm_id)
        if vm_id in busy or route.state == "provisioning":
            continue
        shown = of_app.get(vm_id, ())
        own = [machine for machine in shown if machine.id == route.machine_id]
        if own and not is_given_up:
            kinds = mends(phone, route, own[0], blueprint, is_suspect=vm_id in suspects)
            yield from (Action(kind, vm_id, phone) for kind in kinds)
            continue
        proofs = filter(None, map(blueprint.own_proof, shown))
        proven = [proof.route.machine_id for proof in proofs if proof.phone == phone]
        if len(proven) == 1:
            yield Action("take_over", vm_id, phone, proven[0])
        elif is_whole and not is_given_up:
            yield Action("give_up", vm_id, phone)
    yield from sort_unknown({app: of_app[app] for app in unknown}, routes, blueprint)


def mends(
    phone: str, route: Route, machine: Machine, blueprint: Blueprint, *, is_suspect: bool
) -> Iterator[str]:
    match route.state, machine.state:
        case "asleep", "started":
            yield "note_awake"
        case "ready", "stopped" | "suspended":
            yield "start"
        case "ready", "started" if is_suspect:
            yield "probe"
    if machine.image not in ("", route.image):
        yield "note_image"
    stamp = blueprint.stamp(phone, route)
    if machine.config and not stamp.items() <= machine.metadata.items():
        yield "stamp"


def sort_unknown(
    apps: Mapping[str, list[Machine]], routes: Collection[str], blueprint: Blueprint
) -> Iterator[Action]:
    """Apps nobody here knows: adopted if they prove whose they are."""
    machines = [machine for several in apps.values() for machine in several]
    proofs = list(filter(None, map(blueprint.own_proof, machines)))
    claimants = Counter(proof.phone for proof in proofs)
    proven = {proof.route.vm_id: proof for proof in proofs}
    prefix = blueprint.settings.vm.app_prefix + "-"
    for app, several in apps.items():
        proof = proven.get(app)
        phone = proof.phone if proof else ""
        if proof and claimants[phone] == 1 and phone not in routes:
            yield Action("adopt", app, phone, proof.route.machine_id)
        elif app.startswith(prefix) or any(map(blueprint.is_stamped, several)):
            yield Action("report", app, phone)


def what_is_due(found: Iterable[Action], found_before: Collection[Action]) -> list[Action]:
    """Lists may lag: most is done only if the last sweep found it, too."""
    at_first_sight = ("note_awake", "start", "probe")
    return [action for action in found if action.kind in at_first_sight or action in found_before]


def told_of(due: Iterable[Action]) -> str:
    """What a sweep does nothing about, or nothing."""
    apps = sorted((action.vm_id, action.phone) for action in due if action.kind == "report")
    if not apps:
        return ""
    named = [f"{app} (of {mask_phone(phone)})" if phone else app for app, phone in apps[:5]]
    more = ", ..." * (len(apps) > 5)
    remedy = f"if nobody needs them: fly apps destroy {apps[0][0]}"
    return f"{len(apps)} apps that no route leads to: {', '.join(named)}{more}; {remedy}"


async def do_all(call: Callable[[Action], Awaitable[None]], actions: Iterable[Action]) -> None:
    limit = asyncio.Semaphore(AT_ONCE)

    async def do(action: Action) -> None:
        async with limit:
            await call(action)

    await asyncio.gather(*map(do, actions))


@dataclass(kw_only=True, eq=False)
class Reconciler:
    """Compares the routes with Fly every RECONCILE_S, and mends what differs."""

    settings: Settings
    clock: Clock
    routes: RouteStore
    fly: FlyClient
    vms: VmClient
    blueprint: Blueprint
    undo: Undo
    changes: VmChanges
    relay: Relay
    waker: Waker
    tasks: Tasks
    running: dict[str, Work]
    trouble: str = ""
    found_before: set[Action] = field(default_factory=set)
    sick: Counter[str] = field(default_factory=Counter)  # sweeps in a row without /health
    restarted: Recent[None] = field(default_factory=lambda: Recent(10_000, RESTART_AGAIN_S))

    async def run(self) -> None:
        """While Fly refuses us, up to 5 minutes apart."""
        every_s, refusals = self.settings.limits.reconcile_s, 0
        pauses = Backoff(base_s=every_s, cap_s=max(300.0, every_s))
        while True:
            await self.clock.sleep(pauses.ceiling(refusals + 1))
            try:
                await self.sweep()
            except CockpitError as error:
                self.trouble = f"Fly could not be compared with the routes: {error}"
                log_failure("sweep_failed", self.fly, error)
            except Exception as error:
                log_error("sweep_failed", exc_info=error)
            refusals = refusals + 1 if self.fly.trouble else 0

    async def sweep(self) -> None:
        """One comparison and what follows from it; raises UpstreamError."""
        apps = await self.fly.list_apps()
        machines, missing = await self.fly.list_org_machines()
        found = self._compare(apps, machines, missing)
        due = what_is_due(found, self.found_before)
        self.found_before = set(found)
        self.trouble = told_of(due)
        if missing:
            self.trouble = f"Fly could not ask its regions {', '.join(missing)}; {self.trouble}"
        probed = [action.vm_id for action in due if action.kind == "probe"]
        self.sick = Counter({vm_id: self.sick[vm_id] for vm_id in probed})
        await do_all(self._carry_out, due)

    def _compare(
        self, apps: set[str], machines: Sequence[Machine], missing: Sequence[str] = ()
    ) -> list[Action]:
        vms, going = self.relay.vms.values(), {*self.routes.undo, *self.undo.confirmed}
        turning = {vm.vm_id for vm in vms if vm.is_turning()}
        suspects = {vm.vm_id for vm in vms if vm.last_call_failed or vm.away_since is not None}
        busy = going | turning | self.running.keys()
        more: Json = {"busy": busy, "suspects": suspects, "is_whole": not missing}
        return list(compare(apps, machines, self.routes.routes, self.blueprint, **more))

    async def _carry_out(self, action: Action) -> None:
        vm_id, route = action.vm_id, self.routes.of(action.vm_id)
        try:
            if action.kind in ("adopt", "take_over"):
                await self._claim(action)
            elif route and vm_id not in self.running:
                await self._mend(action, route)
        except CockpitError as error:  # left to the next sweep
            log_warning("sweep_step_failed", vm_id=vm_id, action=action.kind, error=str(error))

    async def _mend(self, action: Action, route: Route) -> None:
        kind, vm_id, phone, _ = action
        match kind:
            case "start" if route.state == "ready":
                await self.waker.start_machine(self.relay.state.vm(vm_id, phone))
            case "note_awake":
                await self.waker.look(vm_id)
            case "probe":
                await self._restart_if_hung(route)
            case "note_image":
                image = (await self.fly.get_machine(vm_id, route.machine_id)).image
                await self.routes.update(vm_id, image=image or route.image)
            case "stamp":
                await self.stamp(vm_id)
            case "give_up":
                await self._give_up(phone, route)

    async def _restart_if_hung(self, route: Route) -> None:
        """After three sweeps without /health, once in 10 minutes."""
        vm_id, now = route.vm_id, self.clock.monotonic()
        self.sick[vm_id] = 0 if await self.vms.is_healthy(route) else self.sick[vm_id] + 1
        is_fresh = self.restarted.is_fresh(vm_id, now)
        if self.sick[vm_id] < SICK_SWEEPS or is_fresh or self.relay.may_be_running(vm_id):
            return
        self.restarted.put(vm_id, None, now)
        log_warning("hung_vm_restarted", vm_id=vm_id)
        self.changes.begin(vm_id, "restart")

    async def stamp(self, vm_id: str) -> None:
        """Write it, again if the pairing changes meanwhile; raises UpstreamError."""
        written = ""
        while (found := self.routes.find(vm_id)) and found[1].machine_id:
            phone, route = found
            if route.pairing == written:
                break
            written = route.pairing
            for name, value in self.blueprint.stamp(phone, route).items():
                await self.fly.set_metadata(vm_id, route.machine_id, name, value)
            log_event("stamp_renewed", vm_id=vm_id)

    async def _claim(self, action: Action) -> None:
        """Route a phone to what proves to be its machine, unknown, back, or new."""
        _, vm_id, phone, machine_id = action
        before, proof = self.routes.routes.get(phone), None
        with suppress(UpstreamNotFound):
            machine = await self.fly.get_machine(vm_id, machine_id)
            proof = self.blueprint.own_proof(machine)
        if proof is None or proof.phone != phone:
            return
        if self.routes.routes.get(phone) is not before or vm_id in self.running:
            return
        if before is None:
            self.routes.put(phone, proof.route)
            await self.relay.vm_adopted(vm_id, phone)
            log_warning("vm_adopted", vm_id=vm_id, phone=mask_phone(phone))
        elif before.vm_id == vm_id:
            at_fly = {name: getattr(proof.route, name) for name in AT_FLY}
            self.routes.put(phone, replace(before, **at_fly, last_error=""))
            await self.relay.vm_ready(vm_id)
            log_warning("machine_taken_over", vm_id=vm_id, was=before.state)
        await self.routes.commit()

    async def _give_up(self, phone: str, route: Route) -> None:
        """A VM that Fly, asked for it, does not know: its owner is told once."""
        with suppress(UpstreamNotFound):
            machine = await self.fly.get_machine(route.vm_id, route.machine_id)
            if machine.state != "destroyed" or not machine.host_ok:
                return
        if self.routes.routes.get(phone) is not route:
            return
        log_error("vm_vanished", vm_id=route.vm_id, phone=mask_phone(phone))
        gone: Json = {"state": "failed", "last_error": "its machine is gone from Fly"}
        await self.routes.update(route.vm_id, **gone)
        await self.relay.vm_gone(route.vm_id, phone, "vanished")

    # A start without routes may be a lost disk

    async def adopt_at_start(self) -> None:
        """Adopt what proves to be ours; until then no VM is made."""
        self.routes.closed_because = f"{NOT_ADOPTED}: no answer in time"
        adopting = self.tasks.start(self._adopt())
        with suppress(TimeoutError):
            async with self.clock.time_limit(ADOPT_AT_START_S):
                await asyncio.wait({adopting})

    async def _adopt(self) -> None:
        failures = 0
        while self.routes.closed_because:
            try:
                apps = await self.fly.list_apps()
                machines, missing = await self.fly.list_org_machines()
                if missing:
                    words = f"the regions {', '.join(missing)} were not asked"
                    raise UpstreamUnavailable("fly", "list org machines", words)
                proofs = filter(None, map(self.blueprint.proof, machines))
                self.routes.gateway_id = self._choose({proof.gateway_id for proof in proofs})
                actions = self._compare(apps, machines)
                await do_all(self._claim, [a for a in actions if a.kind == "adopt"])
                self.routes.closed_because = ""
            except CockpitError as error:
                failures += 1
                self.routes.closed_because = f"{NOT_ADOPTED}: {error}"
                log_failure("adoption_refused", self.fly, error)
                await ADOPT_LATER.pause(self.clock, failures)

    def _choose(self, found: set[str]) -> str:
        """GATEWAY_ID, the file's own, or the only one; raises StoreError."""
        wanted, own = self.settings.gateway.gateway_id, self.routes.gateway_id
        chosen = found & {wanted} if wanted else found & {own} or found
        if found and len(chosen) != 1:
            named = ", ".join(sorted(found))
            raise StoreError(f"Fly holds VMs of the gateways {named}: set GATEWAY_ID to one")
        return chosen.pop() if found else own


@dataclass(kw_only=True, eq=False)
class Sleeper:
    """Suspends VMs without work; the next text wakes them."""

    settings: Settings
    clock: Clock
    routes: RouteStore
    fly: FlyClient
    vms: VmClient
    relay: Relay
    waker: Waker
    tasks: Tasks
    not_before: Recent[float] = field(default_factory=lambda: Recent(100_000))  # monotonic

    async def run(self) -> None:
        """Look for VMs without work; suspend at most one a second."""
        while True:
            await self.clock.sleep(LOOK_FOR_IDLE_S)
            for count, phone in enumerate(list(self.routes.routes), 1):
                route = self.routes.routes.get(phone)
                if route and self._is_due(route):
                    self.tasks.start(self._put_to_sleep(phone, route))
                    await self.clock.sleep(1)
                elif count % ROUTES_A_TURN == 0:
                    await self.clock.sleep(0)

    def _is_due(self, route: Route) -> bool:
        is_early = self.clock.monotonic() < self.not_before.get(route.vm_id, NEVER)
        return route.state == "ready" and not is_early and self._is_idle(route)

    def _is_idle(self, route: Route) -> bool:
        """Whether nothing of it is or was in flight for VM_IDLE_S."""
        vm = self.relay.vms.get(route.vm_id)
        last_sign = vm.last_sign() if vm else 0.0
        since = max(self.relay.state.began, route.began_to_be_awake() or 0.0, last_sign)
        is_over = self.clock.now() - since >= self.settings.limits.vm_idle_s
        return is_over and (vm is None or vm.may_sleep())

    async def _put_to_sleep(self, phone: str, route: Route) -> None:
        """Asleep on disk, looked at again, then suspended."""
        vm = self.relay.state.vm(route.vm_id, phone)
        self._leave_alone(route, ASK_IDLE_AGAIN_S)
        try:
            if not await self._may_suspend(route):
                return
            async with vm.machine:
                if self.routes.routes.get(phone) is route and self._is_idle(route):
                    await self._suspend(route, vm)
        except UpstreamError as error:
            log_warning("sleep_not_confirmed", vm_id=route.vm_id, error=str(error))

    async def _may_suspend(self, route: Route) -> bool:
        """Whether it can wake as it was, and idles; raises UpstreamError."""
        machine = await self.fly.get_machine(route.vm_id, route.machine_id)
        if machine.state != "started" or not machine.host_ok:
            return False
        trouble = ""
        if machine.memory_mb > SLEEPER_MEMORY_MB:
            trouble = f"Fly suspends no guest over {SLEEPER_MEMORY_MB} MB"
        elif not machine.keeps_disk:
            trouble = "a cold boot would empty its root disk; upgrade it"
        if trouble:
            self._leave_alone(route, SUSPEND_AGAIN_S, trouble)
            return False
        health = await self.vms.health(route)
        return health.is_well and not health.is_busy

    async def _suspend(self, route: Route, vm: VmState) -> None:
        """An unknown outcome counts as asleep: a sweep finds out."""
        vm_id = route.vm_id
        vm.is_falling_asleep = True
        if vm.away_since is not None:  # it answers again, and nobody waited for that
            vm.away_since = None
            self.relay.state.store.note(vm.put())
        try:
            await self.routes.update(vm_id, state="asleep")
            if self.routes.find(vm_id) and self._is_idle(route):
                await self.fly.suspend_machine(vm_id, route.machine_id)
                self.not_before.forget(vm_id)
                return log_event("vm_asleep", vm_id=vm_id)
        except StoreError:
            pass
        except UpstreamError as error:
            if not (isinstance(error, UpstreamRejected) or is_surely_undone(error)):
                return log_warning("suspend_unknown", vm_id=vm_id, error=str(error))
            self._leave_alone(route, SUSPEND_AGAIN_S, str(error))
        finally:
            vm.is_falling_asleep = False
        return await self.waker.note_awake(vm_id)

    def _leave_alone(self, route: Route, for_s: float, reason: str = "") -> None:
        now = self.clock.monotonic()
        self.not_before.put(route.vm_id, now + for_s, now)
        if reason:
            log_warning("vm_not_suspended", vm_id=route.vm_id, error=reason)


# --- HTTP ---

PROVISION_BODY_BYTES = 512 * 1024
MESSAGE_BODY_BYTES = 256 * 1024
SMS_BODY_BYTES = 64 * 1024
HEAD_BYTES = 16 * 1024
BODY_S = 10.0
FORM_TYPE = "application/x-www-form-urlencoded"
JSON_TYPE = "application/json"
PROBLEM_TYPE = "application/problem+json"
SSE_TYPE = "text/event-stream"
CREDENTIAL_BYTES = 8 * 1024
VARIABLES_MAX = 50
STREAM_BEAT_S = 15.0
MEDIA_WAKE_S = 10.0
SILENCE_S = 60.0
FLY_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
PICTURE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cache-Control": "private",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(eq=False)
class Gateway:
    """The running parts: those given, then those made of them."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    keyring: Keyring
    routes: RouteStore
    messages: MessageStore
    fly: FlyClient
    twilio: TwilioClient
    vms: VmClient
    tasks: Tasks
    # Set-ups and changes on their way, by vm_id.
    running: dict[str, Work] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make = self._make
        self.state = RelayState(self.messages, self.clock, self.routes)
        self.sender = make(Sender)
        self.watch = make(Watch)
        self.waker = make(Waker)
        self.runner = make(Runner)
        self.door = make(PhoneDoor, stamp=self._stamp)
        self.commands = make(OwnerCommands, restart=self._restart)
        self.inbox = make(Inbox)
        self.reports = make(DeliveryReports)
        self.relay = make(Relay)
        self.backfill = make(Backfill)
        self.blueprint = make(Blueprint)
        self.builder = make(Builder)
        self.undo = make(Undo)
        self.provisioner = make(
            Provisioner, on_ready=self.relay.vm_ready, on_gone=self.relay.vm_gone
        )
        self.changes = make(VmChanges)
        self.reconciler = make(Reconciler)
        self.sleeper = make(Sleeper)

    # For the relay, which is made before those it asks.

    async def _stamp(self, vm_id: str) -> None:
        await self.reconciler.stamp(vm_id)

    async def _restart(self, vm_id: str) -> None:
        self.changes.begin(vm_id, "restart")
        await self.routes.commit()

    def _make(self, part: type[T], **more: Any) -> T:
        """A part, given those made so far that its fields name, and `more`."""
        names = {one.name for one in dataclasses.fields(cast(Any, part))} & vars(self).keys()
        return part(**{name: getattr(self, name) for name in names}, **more)


GATEWAY = web.AppKey("gateway", Gateway)
SETTINGS = web.AppKey("settings", Settings)
CLOCK = web.AppKey("clock", Clock)
METRICS = web.AppKey("metrics", Metrics)
STRANGERS = web.AppKey("strangers", SparingLog)

# Errors and keys


def json_response(
    body: Json,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    kind: str = JSON_TYPE,
) -> web.Response:
    headers = {"Cache-Control": "no-store", "Content-Type": kind, **(headers or {})}
    return web.Response(body=to_json(body).encode(), status=status, headers=headers)


def problem_of(refusal: Refusal) -> Json:
    """An RFC 9457 problem document."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(refusal.status).phrase,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": refusal.code,
        **refusal.members,
    }


def problem_response(refusal: Refusal) -> web.Response:
    about: Json = {"status": refusal.status, "headers": refusal.headers}
    return json_response(problem_of(refusal), kind=PROBLEM_TYPE, **about)


def refusal_for_request(error: Exception) -> Refusal:
    """What a caller is told of an error, also of aiohttp's own."""
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            headers = {"Allow": allowed}
            return Refusal("method_not_allowed", f"send one of {allowed}", headers=headers)
        case web.HTTPNotFound():
            return Refusal("not_found", "there is no such path; /openapi.json lists them")
        case web.HTTPException():
            return Refusal("malformed", error.text or error.reason)
    return refusal_for(error)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Here errors become answers, and a request gets its id, Fly's or a new one."""
    given = request.headers.get("Fly-Request-Id", "")
    is_id = FLY_REQUEST_ID.fullmatch(given)
    REQUEST_ID.set(given if is_id else secrets.token_hex(8))
    try:
        # aiohttp bounds the size of a line, and their number.
        if sum(len(name) + len(value) for name, value in request.raw_headers) > HEAD_BYTES:
            raise Refusal("malformed", "over 16 KiB of headers; send fewer")
        # Also what has no such path or method.
        if request.path.startswith("/provision"):
            require_key(request)
        response = await handler(request)
    except Exception as error:
        response = answer_error(request, error)
        error.__traceback__ = None  # it leads to the request and its body
    if not response.prepared:
        response.headers["X-Request-Id"] = REQUEST_ID.get()
        if not request.content.is_eof():  # nothing more is read of a refused body
            response.force_close()
    return response


def answer_error(request: web.Request, error: Exception) -> web.Response:
    found = request.match_info.route.resource
    call = found.canonical if found else "unknown"
    about: Json = {"method": request.method, "call": call}
    try:
        refusal = refusal_for_request(error)
    except Exception as unforeseen:
        log_error("request_failed", exc_info=unforeseen, **about)
        return problem_response(Refusal("internal", "a fault of ours; the log says which"))
    request.app[METRICS].refusals.add(call, refusal.code)
    about |= {"code": refusal.code, "error": redact(refusal.detail)}
    if refusal.status >= 500:
        log_warning("request_refused", **about)
    elif refusal.code in ("unauthorized", "bad_signature"):
        request.app[STRANGERS].warning("request_refused", **about)
    return problem_response(refusal)


def key_of(request: web.Request) -> str:
    """The bearer or the X-API-Key that a caller shows."""
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    shown = bearer.strip() if scheme.lower() == "bearer" else ""
    return shown or request.headers.get("X-API-Key", "")


def has_key(request: web.Request, keys: Iterable[str]) -> bool:
    """Whether the caller sent one of `keys`, each compared in constant time."""
    given = key_of(request).encode("utf-8", "surrogateescape")
    return any([hmac.compare_digest(key.encode(), given) for key in keys])


def unauthorized(remedy: str) -> Refusal:
    return Refusal("unauthorized", remedy, headers={"WWW-Authenticate": "Bearer"})


def require_key(request: web.Request) -> None:
    if not has_key(request, request.app[SETTINGS].gateway.api_keys):
        fault = "this is not the API key; " if key_of(request) else ""
        raise unauthorized(f"{fault}send `Authorization: Bearer KEY` or `X-API-Key: KEY`")


# Bodies

# Of aiohttp's parser in C, and of that in Python, for where there is no other.
UNREADABLE_BODY = (web.RequestPayloadError, HttpProcessingError)


async def read_body(request: web.Request, limit: int, content_type: str) -> bytes:
    """A body of this type and at most this size, counted while it is read.

    Raises Refusal.
    """
    if request.content_type != content_type:
        raise Refusal("unsupported_media_type", f"send Content-Type: {content_type}")
    # What is packed may unfold to any size.
    if "Content-Encoding" in request.headers:
        raise Refusal("unsupported_media_type", "send the body without Content-Encoding")
    size, body = request.content_length or 0, b""
    # Small ones come together with their head.
    is_here = request.content.is_eof()
    patience = contextlib.nullcontext() if is_here else request.app[CLOCK].time_limit(BODY_S)
    try:
        async with patience:
            while size <= limit and (chunk := await request.content.readany()):
                body += chunk
                size = max(size, len(body))
    except TimeoutError:
        raise Refusal("malformed", f"the body took more than {BODY_S:g} s") from None
    except (*UNREADABLE_BODY, ConnectionError):
        raise Refusal("malformed", "the body does not arrive as its headers say") from None
    if size > limit:
        raise Refusal("too_large", f"the body is larger than {limit // 1024} KiB")
    return body


async def read_json(request: web.Request, limit: int) -> Json:
    raw, fault = await read_body(request, limit, JSON_TYPE), ""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        body, fault = None, f": {error}"
    if not isinstance(body, dict):
        raise Refusal("malformed", f"the body must be a JSON object{fault}")
    return body


# Fields by their JSON Schema, which checks and describes them: what does not fit "must be" as
# described. `?` marks what may be left out.
Fields = Mapping[str, Json]


def text_like(pattern: str, description: str, **more: Any) -> Json:
    return {"type": "string", "pattern": f"^{pattern}$", "description": description, **more}


TEXT: Json = {"type": "string", "description": "a text"}
TEXT_OR_NULL: Json = {"type": ["string", "null"]}
LIST: Json = {"type": "array", "items": {}}
OBJECT: Json = {"type": "object"}
FLAG: Json = {"type": ["boolean", "null"], "description": "true or false"}
CREDENTIAL = text_like(
    r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+",
    f"a text of 1 to {CREDENTIAL_BYTES} bytes without control characters or line ends",
    maxLength=CREDENTIAL_BYTES,
    writeOnly=True,
)
RESERVED = (
    "PATH|HOME|PORT|HOST|GITHUB_TOKEN|NODE_OPTIONS|BASH_ENV|(LD_|PYTHON|FLY_|COCKPIT_|OPENSSL_).*"
)
VARIABLES = OBJECT | {
    "description": f"an object of 1 to {VARIABLES_MAX} environment variables",
    "minProperties": 1,
    "maxProperties": VARIABLES_MAX,
    "propertyNames": text_like(
        f"(?!({RESERVED})$)[A-Z][A-Z0-9_]{{0,127}}",
        "named like an environment variable (A-Z, 0-9, _; a letter first) that is not reserved",
    ),
    "additionalProperties": CREDENTIAL,
    "examples": [{"ANTHROPIC_API_KEY": "sk-..."}],
}
ORDER_FIELDS: Fields = {
    "phone_number": text_like(
        r"[ .()-]*\+[ .()-]*[1-9]([ .()-]*[0-9]){6,14}[ .()-]*",
        "a phone number in E.164 form, such as +15551234567",
        examples=["+15551234567"],
    ),
    "github_token": CREDENTIAL,
    "api_keys": VARIABLES,
    "region?": text_like("[a-z]{2,5}", "a Fly region code such as iad", examples=["iad"])
    | TEXT_OR_NULL,
    "welcome?": FLAG,
    "verify?": FLAG,
}
NEW_CREDENTIALS: Fields = {"github_token?": CREDENTIAL, "api_keys?": VARIABLES}
VM_MESSAGE: Fields = {
    "text?": TEXT,
    "images?": LIST
    | {
        "description": f"at most {MAX_IMAGES} images of this VM, such as /images/a.png",
        "items": text_like(IMAGE_PATH.pattern, "a path, or an object with it as url"),
        "maxItems": MAX_IMAGES,
        "examples": [["/images/chart.png"]],
    },
}
PAGING: Fields = {
    "limit?": text_like(
        "([1-9][0-9]{0,2}|1000)", "a whole number from 1 to 1000", examples=["1", "1000"]
    ),
    "after?": TEXT,
}
JSON_TYPES = {str: "string", bool: "boolean", list: "array", dict: "object", type(None): "null"}
# The words of JSON Schema used above, type first: the others rely on it.
WORDS: dict[str, Callable[[Any, Any], object]] = {
    "type": lambda value, kinds: JSON_TYPES.get(type(value), "other") in kinds,
    "pattern": lambda value, pattern: value is None or re.fullmatch(pattern, value),
    "maxLength": lambda value, most: len(value.encode()) <= most,
    "minProperties": lambda value, least: len(value) >= least,
    "maxProperties": lambda value, most: len(value) <= most,
    "maxItems": lambda value, most: len(value) <= most,
    "items": lambda value, schema: all(fits(one, schema) for one in value),
}


def fits(value: Any, schema: Json) -> bool:
    """Whether a value is as its JSON Schema says."""
    return all(is_so(value, schema[word]) for word, is_so in WORDS.items() if word in schema)


class FieldErrors:
    """What is wrong with a request's fields, all of it told at once."""

    def __init__(self, values: Mapping[str, Any], fields: Fields) -> None:
        self.errors: list[Json] = []
        schemas = {name.rstrip("?"): schema for name, schema in fields.items()}
        for name in values:
            if name not in schemas:
                self.add(redact(name), "is not a field of this request; leave it out")
        for name, schema in schemas.items():
            if name in values:
                self._compare(name, values[name], schema)
            elif name in fields:
                self.add(name, "is required")

    def _compare(self, name: str, value: Any, schema: Json) -> None:
        if not fits(value, schema):
            self.add(name, f"must be {schema['description']}")
        elif inner := schema.get("additionalProperties"):
            for key, one in value.items():
                label = f"{name}.{redact(key)}"
                self._compare(label, key, schema["propertyNames"])
                self._compare(label, one, inner)

    def add(self, name: str, message: str) -> None:
        self.errors.append({"field": name, "message": message})

    def check(self) -> None:
        if self.errors:
            names = ", ".join(error["field"] for error in self.errors)
            raise Refusal("invalid_request", f"not valid: {names}", errors=self.errors)


def credentials_in(body: Json) -> dict[str, str]:
    """The environment variables that `github_token` and `api_keys` ask for."""
    token = {"GITHUB_TOKEN": body["github_token"]} if "github_token" in body else {}
    return {**token, **body.get("api_keys", {})}


def parse_order(body: Json, settings: Settings) -> Order:
    """A sign-up; raises Refusal naming each field that is wrong."""
    errors = FieldErrors(body, ORDER_FIELDS)
    errors.check()
    phone, verify = normalise_phone(body["phone_number"]), body.get("verify")
    if phone == settings.twilio.phone_number:
        errors.add("phone_number", "is the gateway's own; give the engineer's")
        errors.check()
    return Order(
        phone=phone,
        credentials=credentials_in(body),
        region=body.get("region") or "",
        welcome=bool(body.get("welcome")),
        verify=settings.gateway.verify_phone if verify is None else verify,
    )


# Answers


def accepts(request: web.Request, kind: str) -> bool:
    return kind in request.headers.get("Accept", "").lower()


def event_stream() -> web.StreamResponse:
    """An answer of server-sent events, to be prepared and written to."""
    headers = {
        "Content-Type": f"{SSE_TYPE}; charset=utf-8",
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
        "X-Request-Id": REQUEST_ID.get(),
    }
    return web.StreamResponse(headers=headers)


def server_sent(event: str, data: Json) -> bytes:
    return f"event: {event}\ndata: {to_json(data)}\n\n".encode()


# VMs


def vm_record(gateway: Gateway, vm_id: str) -> Json:
    """The VM record with what only the relay knows; raises Refusal."""
    record = gateway.provisioner.record(vm_id)
    vm_id = record["vm_id"]
    vm, route = gateway.relay.vms.get(vm_id), gateway.routes.of(vm_id)
    if record["state"] in ("ready", "asleep"):
        if change := gateway.changes.running.get(vm_id):
            record |= {"state": "away", "step": change.what}
        elif vm and vm.away_since is not None:
            record["state"] = "away"
    if route:
        record["awake_s"] = route.awake_for(gateway.clock.now())
        if not route.is_paired:
            record["pairing_code"] = gateway.keyring.pairing_codes(route)[0]
    if vm and vm.error and not record["last_error"]:
        record["last_error"] = vm.error
    return record


def vm_ids_after(routes: RouteStore, after: str, limit: int) -> list[str]:
    """Up to `limit` ids behind `after`, in order, of VMs routed or being deleted."""
    deleting = [
        vm_id
        for vm_id, entry in routes.undo.items()
        if vm_id > after and entry.get("reason") != "failed"
    ]
    return sorted(routes.page(after, limit) + deleting)[:limit]


def location_of(gateway: Gateway, vm_id: str) -> str:
    """Where a VM's record is: PUBLIC_URL may have a path."""
    prefix = urlsplit(gateway.settings.gateway.public_url).path
    return f"{prefix}/provision/{vm_id}"


async def outcome_of(request: web.Request, work: Work) -> web.Response:
    """The record once it is done, or 202 at once for who prefers that (RFC 7240)."""
    gateway = request.app[GATEWAY]
    status = 201 if isinstance(work, Provisioning) else 200
    if "respond-async" in ",".join(request.headers.getall("Prefer", ())).lower():
        await gateway.routes.commit()  # 202 is a promise: it is kept across a crash
        status = 202
    else:
        await work.outcome()
    headers = {"Location": location_of(gateway, work.vm_id)}
    return json_response(vm_record(gateway, work.vm_id), status=status, headers=headers)


async def post_provision(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    order = parse_order(await read_json(request, PROVISION_BODY_BYTES), gateway.settings)
    provisioning = gateway.provisioner.begin(order)
    if accepts(request, SSE_TYPE):
        return await stream_steps(request, provisioning)
    return await outcome_of(request, provisioning)


async def stream_steps(request: web.Request, provisioning: Provisioning) -> web.StreamResponse:
    """Each step as it ends, as server-sent events; a dropped stream stops nothing."""
    gateway, vm_id, sent = request.app[GATEWAY], provisioning.vm_id, 0
    response = event_stream()
    response.headers["Location"] = location_of(gateway, vm_id)
    assert provisioning.task is not None
    with suppress(ConnectionError):
        await response.prepare(request)
        while True:
            provisioning.moved.clear()
            for step, seconds in list(provisioning.seconds.items())[sent:]:
                sent += 1
                await response.write(server_sent("step", {"step": step, "seconds": seconds}))
            if provisioning.task.done():
                break
            try:
                async with gateway.clock.time_limit(STREAM_BEAT_S):
                    await provisioning.moved.wait()
            except TimeoutError:
                await response.write(b": still working\n\n")
        try:
            await provisioning.outcome()
            last = server_sent("ready", vm_record(gateway, vm_id))
        except Refusal as refusal:
            last = server_sent("failed", problem_of(refusal))
        await response.write(last)
        await response.write_eof()
    return response


async def get_provisions(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    FieldErrors(request.query, PAGING).check()
    limit, after = int(request.query.get("limit", 100)), request.query.get("after", "")
    vm_ids = vm_ids_after(gateway.routes, after, limit + 1)
    vms = [vm_record(gateway, vm_id) for vm_id in vm_ids[:limit]]
    following = vm_ids[limit - 1] if len(vm_ids) > limit else None
    return json_response({"vms": vms, "next": following})


async def get_provision(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    record = vm_record(gateway, request.match_info["vm_id"])
    texts = gateway.relay.state.texts_of(record["vm_id"])
    return json_response({**record, "texts": [trace.to_json() for trace in texts]})


async def delete_provision(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    vm_id = gateway.provisioner.record(request.match_info["vm_id"])["vm_id"]
    # A caller who hangs up must not leave the teardown half-way.
    teardown = gateway.tasks.start(gateway.provisioner.tear_down(vm_id))
    if await asyncio.shield(teardown):
        return web.Response(status=204)
    return json_response(vm_record(gateway, vm_id), status=202)


async def change_vm(request: web.Request, what: str, **credentials: str) -> web.Response:
    """Restart, rotate or upgrade a VM."""
    changes = request.app[GATEWAY].changes
    change = changes.begin(request.match_info["vm_id"], what, **credentials)
    return await outcome_of(request, change)


async def lock_vm(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    vm_id = gateway.provisioner.record(request.match_info["vm_id"])["vm_id"]
    found = gateway.routes.find(vm_id)
    if found is None:
        raise Refusal("wrong_state", f"{vm_id} is gone, nothing to lock", vm_id=vm_id)
    await gateway.door.lock(gateway.state.vm(vm_id, found[0]))
    return json_response(vm_record(gateway, vm_id))


async def patch_provision(request: web.Request) -> web.Response:
    body = await read_json(request, PROVISION_BODY_BYTES)
    errors = FieldErrors(body, NEW_CREDENTIALS)
    if not body:
        errors.add("github_token", "give this, api_keys, or both")
    errors.check()
    return await change_vm(request, "rotate", **credentials_in(body))


# Texts


async def read_webhook(request: web.Request) -> list[tuple[str, str]]:
    """The form of a webhook that Twilio signed for our account; raises Refusal."""
    settings = request.app[SETTINGS]
    twilio = settings.twilio
    raw = await read_body(request, SMS_BODY_BYTES, FORM_TYPE)
    try:
        pairs = parse_form(raw)
    except ValueError:
        raise Refusal("malformed", "the body is not a form in UTF-8") from None
    header = request.headers.get("X-Twilio-Signature")
    url = settings.gateway.public_url + request.raw_path
    is_ours = any(is_signed(token, url, pairs, header) for token in twilio.auth_tokens)
    # It names a SharedKey, of which there is none here.
    if "X-Twilio-Webhooks-Signature-Settings" in request.headers or not is_ours:
        reason = "not signed by Twilio; check PUBLIC_URL and TWILIO_AUTH_TOKEN"
        raise Refusal("bad_signature", reason)
    # The signature knows no borders between fields: what could be cut anew is refused.
    sids = [value for name, value in pairs if name in ("MessageSid", "SmsSid", "SmsMessageSid")]
    are_usual = all(map(MESSAGE_SID.fullmatch, sids))
    are_usual = are_usual and all(name.isascii() and name.isalnum() for name, _ in pairs)
    if not are_usual or ("AccountSid", twilio.account_sid) not in pairs:
        reason = "signed, but of another TWILIO_ACCOUNT_SID, or cut anew"
        raise Refusal("bad_signature", reason)
    return pairs


async def post_sms(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    message = parse_inbound(await read_webhook(request), gateway.clock.now())
    reply = await gateway.inbox.accept(message)
    return web.Response(body=twiml(reply).encode(), content_type="text/xml", charset="utf-8")


async def post_sms_status(request: web.Request) -> web.Response:
    form = dict(reversed(await read_webhook(request)))
    request.app[GATEWAY].reports.handle(form, request.query.get("vm", ""))
    return web.Response(status=204)


def require_vm(request: web.Request) -> tuple[str, Route]:
    """Phone and route of the VM whose token this request carries.

    Raises Refusal.
    """
    gateway = request.app[GATEWAY]
    vm_id = gateway.keyring.vm_of_token(key_of(request))
    found = gateway.routes.find(vm_id) if vm_id else None
    if found is None or found[1].state == "failed":
        raise unauthorized("send the COCKPIT_TOKEN of a VM that lives as bearer")
    return found


async def post_messages(request: web.Request) -> web.Response:
    """A VM texts its own owner, unasked."""
    phone, route = require_vm(request)
    body = await read_json(request, MESSAGE_BODY_BYTES)
    if isinstance(images := body.get("images", []), list):
        images = [object_in(image).get("url", image) for image in images]
    errors = FieldErrors({**body, "images": images}, VM_MESSAGE)
    errors.check()
    words = clean_text(body.get("text", ""))
    words = words.strip("\n") if words.strip() else ""
    if not (words or images):
        errors.add("text", "must hold something to say, unless there are images")
        errors.check()
    relay = request.app[GATEWAY].relay
    key = request.headers.get("Idempotency-Key", "")[:128]
    message_id = await relay.accept_vm_message(route.vm_id, phone, words, tuple(images), key)
    return json_response({"id": message_id}, status=202)


async def get_message(request: web.Request) -> web.Response:
    require_key(request)
    trace = request.app[GATEWAY].relay.state.traces.get(request.match_info["sid"])
    if trace is None:
        raise Refusal("not_found", f"not among the last {TRACES_KEPT} texts")
    return json_response(trace.to_json())


async def get_media(request: web.Request) -> web.StreamResponse:
    """A VM's image, or a phone's picture, for who holds the link."""
    gateway = request.app[GATEWAY]
    vm_id, path = gateway.keyring.open_link(request.match_info["signed"], gateway.clock.now())
    found = gateway.routes.find(vm_id)
    is_image = bool(IMAGE_PATH.fullmatch(path))
    if not found or found[1].state == "failed" or not (is_image or gateway.twilio.is_media(path)):
        raise Refusal("not_found", "this is no link to a picture, or its VM is gone")
    phone, route = found
    if is_image and route.state == "asleep":
        vm = gateway.state.vm(vm_id, phone)
        if not await gateway.waker.rouse(vm, within_s=MEDIA_WAKE_S):
            raise Refusal("fly_unavailable", "the VM sleeps and is being woken; try again")
    vms, twilio = gateway.vms, gateway.twilio
    response = web.StreamResponse(headers=PICTURE_HEADERS)
    try:
        async with vms.open_image(route, path) if is_image else twilio.open_media(path) as source:
            await pass_on(request, source, response, pictures_only=is_image)
    except (aiohttp.ClientError, OSError) as error:
        if not response.prepared:
            raise Refusal("vm_unreachable", "not to be had just now; try again") from error
        log_warning("media_cut", vm_id=vm_id, error=type(error).__name__)
        if request.transport is not None:
            request.transport.abort()  # the only way to tell that it is not whole
    return response


async def pass_on(
    request: web.Request,
    source: aiohttp.ClientResponse,
    response: web.StreamResponse,
    *,
    pictures_only: bool,
) -> None:
    """Stream at most 5 MB, as what the first bytes say it is.

    Raises Refusal.
    """
    size, is_packed = source.content_length, "Content-Encoding" in source.headers
    if source.status != HTTPStatus.OK or is_packed or (size or 0) > MAX_IMAGE_BYTES:
        raise Refusal("not_found", "there is no such image, or it is larger than 5 MB")
    chunk = b""
    while len(chunk) < 8 and (more := await source.content.readany()):
        chunk += more
    kind = kind_of_picture(chunk)
    if not kind and pictures_only:
        raise Refusal("not_found", "this is not a PNG, JPEG or GIF image")
    response.content_type = kind or "application/octet-stream"
    response.content_length = size
    await response.prepare(request)
    sent = 0
    while chunk and request.method != "HEAD":
        sent += len(chunk)
        if sent > MAX_IMAGE_BYTES:
            raise aiohttp.ClientPayloadError("larger than 5 MB")
        await response.write(chunk)
        chunk = await source.content.readany()


# How it is


def vms_by_state(gateway: Gateway) -> dict[str, int]:
    known, away = gateway.routes.states, gateway.relay.away_states()
    return {
        "ready": known["ready"] - away["ready"],
        "asleep": known["asleep"] - away["asleep"],
        "away": away.total(),
        "provisioning": known["provisioning"],
        "deleting": len(gateway.routes.undo),
        "failed": known["failed"],
    }


class Alert(NamedTuple):
    """What is not well: its kind for all, its words for who has the key."""

    kind: str
    words: str


def alerts(gateway: Gateway) -> list[Alert]:
    routes, fly, twilio = gateway.routes, gateway.fly, gateway.twilio
    found = [
        ("disk", routes.trouble),
        ("disk", gateway.messages.trouble),
        ("twilio", twilio.trouble),
        ("fly", fly.trouble),
        ("routes", routes.closed_because),
        ("fly", gateway.reconciler.trouble),
    ]
    now = gateway.clock.monotonic()
    for kind, since in (("fly", fly.api.silent_since), ("twilio", twilio.api.silent_since)):
        if since is not None and now - since > SILENCE_S:
            words = f"{kind.capitalize()} has not answered for {now - since:.0f} s"
            found.append((kind, words))
    if closed := gateway.door.closed_vms():
        named = ", ".join(closed[:5]) + ", ..." * (len(closed) > 5)
        remedy = "POST /provision/{vm_id}/lock gives a new one"
        found.append(("routes", f"closed after too many wrong codes: {named}; {remedy}"))
    if routes.undo:
        found.append(("fly", f"{len(routes.undo)} VMs whose deletion Fly has not confirmed"))
    return [Alert(kind, words) for kind, words in found if words]


def gauge(name: str, meaning: str, value: float) -> Gauge:
    kind = "counter" if name.endswith("_total") else "gauge"
    return Gauge(name, meaning, {"": value}, kind=kind)


async def get_metrics(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    token = gateway.settings.gateway.metrics_token
    if token and not has_key(request, [token]):
        raise unauthorized("send METRICS_TOKEN as bearer")
    relay, routes = gateway.relay, gateway.routes
    gauges = [
        Gauge("vms", "VMs by state.", vms_by_state(gateway), "state"),
        gauge("texts_waiting", "Texts accepted and not yet finished.", relay.waiting()),
        gauge("oldest_waiting_seconds", "Age of the oldest of them.", relay.oldest_waiting_s()),
        gauge("messages_waiting", "Messages not yet taken by Twilio.", relay.sending()),
        gauge("oldest_message_seconds", "Age of the oldest of them.", relay.oldest_sending_s()),
        gauge("troubles", "Troubles that /health names.", len(alerts(gateway))),
        gauge("draining", "1 while shutting down.", relay.is_draining),
        gauge("vm_awake_seconds_total", "Time VMs were awake.", round(routes.awake_seconds())),
    ]
    kind = "text/plain; version=0.0.4; charset=utf-8"
    headers = {"Content-Type": kind, "Cache-Control": "no-store"}
    return web.Response(text=gateway.metrics.expose(gauges), headers=headers)


async def get_health(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    relay, found = gateway.relay, alerts(gateway)
    is_known = has_key(request, gateway.settings.gateway.api_keys)
    kinds = sorted({alert.kind for alert in found})
    body = {
        "status": "draining" if relay.is_draining else "ok",
        "vms": {state: count for state, count in vms_by_state(gateway).items() if count},
        "waiting": relay.waiting(),
        "sending": relay.sending(),
        "troubles": [alert.words for alert in found] if is_known else kinds,
    }
    return json_response(body, status=503 if relay.is_draining else 200)


# --- Page ---

FEED_EVERY_S = 2.0
ROWS_MAX = 1_000  # further VMs are counted, not listed
ROWS_A_TURN = 100  # rows made before other tasks get the event loop
PAGE = web.AppKey("page", tuple[str, dict[str, str]])


def fleet_summary(gateway: Gateway) -> Json:
    """What the page's tiles, chart and notes show."""
    settings, metrics, relay = gateway.settings, gateway.metrics, gateway.relay
    return {
        "at": gateway.clock.now(),
        "mode": "production" if settings.gateway.is_production else "local",
        "number": mask_phone(settings.twilio.phone_number),
        "regions": settings.vm.regions,
        "vms": vms_by_state(gateway),
        "texts_a_minute": round(metrics.texts_a_minute(), 1),
        "median_s": metrics.quantile(0.5),
        "p99_s": metrics.quantile(0.99),
        "waiting": relay.waiting(),
        "oldest_s": relay.oldest_waiting_s(),
        "hour": metrics.last_hour(),
        "troubles": [alert.words for alert in alerts(gateway)],
    }


def row_of(gateway: Gateway, vm_id: str) -> Json:
    """One VM as the table shows it, its number masked; raises Refusal when it is gone."""
    record = vm_record(gateway, vm_id)
    vm = gateway.relay.vms.get(vm_id)
    names = ("vm_id", "state", "step", "region", "image", "last_error", "paired")
    return {name: record[name] for name in names} | {
        "phone": mask_phone(record["phone_number"]),
        "waiting": len(vm.waiting) if vm else 0,
        "last_text": vm.last_text if vm else None,
        "away_since": vm.away_since if vm else None,
    }


async def fleet_news(gateway: Gateway) -> dict[str, Json]:
    """The feed's events: `fleet`, and `table`: the first 1,000 VMs in order of vm_id."""
    rows: list[Json] = []
    vm_ids = vm_ids_after(gateway.routes, "", ROWS_MAX)
    for at, vm_id in enumerate(vm_ids):
        if at % ROWS_A_TURN == 0:
            await gateway.clock.sleep(0)
        with suppress(Refusal):  # torn down since the ids were read
            rows.append(row_of(gateway, vm_id))
    table = {"rows": rows, "is_whole": len(vm_ids) < ROWS_MAX}
    return {"fleet": fleet_summary(gateway), "table": table}


async def get_events(request: web.Request) -> web.StreamResponse:
    """The page's live feed: every 2 s what changed; all of it once, as JSON, for who asks so."""
    require_key(request)
    gateway = request.app[GATEWAY]
    if not accepts(request, SSE_TYPE):
        return json_response(await fleet_news(gateway))
    response = event_stream()
    sent: dict[str, bytes] = {}
    with suppress(ConnectionError):
        await response.prepare(request)
        while not gateway.relay.is_draining:
            for name, news in (await fleet_news(gateway)).items():
                event = server_sent(name, news)
                if event != sent.get(name):
                    await response.write(event)
                sent[name] = event
            await gateway.clock.sleep(FEED_EVERY_S)
    return response


async def get_page(request: web.Request) -> web.Response:
    html, headers = request.app[PAGE]
    return web.Response(text=html, content_type="text/html", headers=headers)


def csp_hash(inline: str) -> str:
    digest = hashlib.sha256(inline.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def render_page(*, with_phone: bool, hint: str) -> tuple[str, dict[str, str]]:
    """The page, and the headers that let it run nothing but itself; `hint` says where the API key is."""
    script = PAGE_FEED + PAGE_BOARD + PAGE_ACTIONS + (PAGE_PHONE if with_phone else "")
    pane = PAGE_PHONE_PANE if with_phone else ""
    body = PAGE_BODY.replace("{hint}", hint).replace("{phone}", pane)
    html = f"{PAGE_HEAD}<style>{PAGE_STYLE}</style>{body}<script>{script}</script></html>"
    policy = (
        f"default-src 'none'; script-src {csp_hash(script)}; style-src {csp_hash(PAGE_STYLE)}; "
        "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return html, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


PAGE_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>cockpit</title>
<link rel="icon" href="data:,">
"""

PAGE_STYLE = """
:root{
color-scheme:light dark;
scroll-padding-top:72px;
--go:light-dark(#2b5fd0,#8db2ff);
--ok:light-dark(#17743f,#56c78c);
--warn:light-dark(#8a5800,#e5ab45);
--bad:light-dark(#b92534,#ff9096);
--dim:color-mix(in srgb,CanvasText 66%,Canvas);
--line:color-mix(in srgb,CanvasText 14%,Canvas);
--soft:color-mix(in srgb,CanvasText 5%,Canvas);
}
*{box-sizing:border-box;min-width:0}
body:not(.in) :is(#tools,#board),.in #gate{display:none}
:is(ul,#pairing,p:not([role])):empty{display:none}
body{
margin:0;
background:var(--soft);
color:CanvasText;
font:14px/1.45 system-ui,sans-serif;
}
h1,h2,h3,p,ol,ul,dl,dd,figure{
margin:0;
padding:0;
list-style:none;
font-size:15px;
outline:0;
}
p,dd{font-size:14px;overflow-wrap:anywhere}
code{font:12px ui-monospace,monospace;color:var(--dim);overflow-wrap:anywhere}
button,input,select{font:inherit;color:inherit;background:Canvas;padding:7px 11px}
button,input,select,.card,dialog{border:1px solid var(--line);border-radius:9px}
button,input,select,summary,label.row{min-height:40px}
input:not([type=checkbox]),select{width:100%;border-color:var(--dim)}
::placeholder{color:var(--dim);opacity:1}
button,summary{cursor:pointer;font-weight:550;flex:none}
summary{padding:9px 0}
:is(button,#rows li):not(.go):hover{background:var(--soft)}
#kill,.error,.fault,[aria-invalid=true]{color:var(--bad);border-color:var(--bad)}
.go{background:var(--go);border-color:var(--go);color:Canvas}
.flat{border-color:transparent;background:none}
.dim,small,dt{color:var(--dim);font-size:12.5px}
header,.card,dialog{background:Canvas;color:CanvasText}
.row{display:flex;flex-wrap:wrap;gap:8px 10px;align-items:center}
.grow{flex:1}
.stack{display:grid;gap:14px}
.bar,#tiles .card{padding:12px 16px}
header{
padding:8px 24px;
border-bottom:1px solid var(--line);
position:sticky;
top:0;
z-index:2;
}
#gate{max-width:380px;margin:14vh auto;padding:28px}
#board{max-width:1560px;margin:auto;padding:18px 24px}
#troubles{border-color:var(--warn);padding:10px 16px}
#tiles{display:grid;gap:12px;grid-template-columns:repeat(3,1fr) 3fr}
#tiles b{display:block;font-size:25px;line-height:1.3}
#hour{display:grid;grid-template:auto 1fr auto auto/auto 1fr;gap:1px 8px}
figcaption{grid-column:1/-1}
svg{
grid-area:2/2/4/3;
width:100%;
height:56px;
border:solid var(--line);
border-width:1px 0;
stroke-width:4.8;
}
#hour .axis{grid-column:2;display:flex;justify-content:space-between}
#all-sum::before,#failed-sum::before{content:"■ ";color:var(--go)}
#failed-sum::before{color:var(--bad)}
#work{display:flex;gap:14px;align-items:start}
#filter{flex:0 1 300px}
#rows li{
position:relative;
display:grid;
gap:2px 12px;
padding:9px 16px;
border-top:1px solid var(--line);
grid-template:"who id state spoke" "bad bad bad bad"/9em 13em 1fr 9em;
align-items:center;
}
#rows .who{
grid-area:who;
padding:0;
min-height:24px;
border:0;
background:none;
text-align:left;
}
.who::after{content:"";position:absolute;inset:0}
#rows .spoke{grid-area:spoke;text-align:right;font-variant-numeric:tabular-nums}
#rows p{grid-area:bad}
#status::before,.state::before{content:"● ";color:var(--dim)}
#status.live::before,.ready .state::before{color:var(--ok)}
.away .state::before,.deleting .state::before{color:var(--warn)}
#status.lost::before,.failed .state::before{color:var(--bad)}
.asleep .state::before{content:"○ "}
#none{padding:40px 16px;text-align:center}
#phone{
flex:0 0 310px;
display:flex;
flex-direction:column;
height:min(640px,100dvh - 90px);
}
#thread{
flex:1;
overflow-y:auto;
padding:14px;
display:flex;
flex-direction:column;
gap:4px;
}
:is(#thread,#texts):empty::before{content:"No texts yet.";color:var(--dim)}
#thread div{
max-width:84%;
padding:7px 12px;
border-radius:15px;
background:var(--soft);
white-space:pre-wrap;
overflow-wrap:anywhere;
align-self:flex-start;
}
#thread .in{background:var(--go);color:Canvas;align-self:flex-end}
#thread .note{background:none;border:1px dashed var(--line);color:var(--dim)}
#thread :is(img,time){display:block;max-width:100%;font-size:11px}
#phone>:is(p,small){padding:0 16px}
:is(.pair,#phone .row){flex-wrap:nowrap}
dialog{padding:22px;width:min(640px,100vw - 20px)}
dialog::backdrop{background:#0007}
label:not(.row){display:grid;gap:4px;font-weight:550}
#make{max-width:460px}
#record{display:grid;grid-template-columns:5em 1fr;gap:3px 12px}
.code{font:700 40px ui-monospace,monospace;letter-spacing:.12em}
#texts li{padding:6px 0;border-top:1px solid var(--line)}
#texts :is(small,code){display:block}
details p{margin-bottom:10px}
#changes :last-child>.go{background:var(--bad);border-color:var(--bad)}
#to-phone{display:none}
@media(max-width:1240px){
#to-phone{display:block}
#tiles{grid-template-columns:repeat(3,1fr)}
#hour{grid-column:1/-1}
#work{flex-direction:column;align-items:stretch}
#phone{flex:none}
}
@media(max-width:720px){
header,#board{padding:8px 12px}
#mode,#rows code{display:none}
#tiles b{font-size:20px}
#rows li{grid-template:"who spoke" "state state" "bad bad"/1fr auto}
#status{order:9;flex:1 0 100%}
#new{margin-left:auto}
}
"""

PAGE_BODY = """
<header class="row">
<h1>cockpit</h1>
<div id="tools" class="row grow">
<span id="mode" class="dim"></span>
<span id="status" class="dim grow" role="status">Connecting</span>
<button id="new" class="go">New VM</button>
<button id="out" class="flat">Sign out</button>
</div>
</header>
<main id="gate" class="card">
<form id="enter" class="stack">
<h2>Sign in</h2>
<p class="dim">The page keeps the key in this tab only.</p>
<label>API key
<input id="key" type="password" autocomplete="off" required autofocus aria-describedby="why hint">
</label>
<p id="hint" class="dim">{hint}</p>
<p id="why" class="error" role="alert"></p>
<button class="go">Open</button>
</form>
</main>
<main id="board">
<div class="stack">
<ul id="troubles" class="card" aria-label="Troubles"></ul>
<div id="tiles">
<div class="card">
<span class="dim">VMs</span>
<b id="vms">–</b>
<small id="states"></small>
</div>
<div class="card">
<span class="dim">Text to answer</span>
<b id="median">–</b>
<small id="p99"></small>
</div>
<div class="card">
<span class="dim">Waiting</span>
<b id="waiting">–</b>
<small id="oldest"></small>
</div>
<figure id="hour" class="card">
<figcaption class="row dim">
<span id="rate" class="grow"></span>
<span id="all-sum"></span>
<span id="failed-sum"></span>
</figcaption>
<small id="most"></small>
<svg viewBox="0 0 360 56" preserveAspectRatio="none" aria-hidden="true">
<path id="all" stroke="var(--go)"/>
<path id="failed" stroke="var(--bad)"/>
</svg>
<small>0</small>
<small class="axis"><span>60 min ago</span><span>now</span></small>
</figure>
</div>
<div id="work">
<section class="card grow" aria-label="VMs">
<div class="bar row">
<h2>VMs</h2>
<span id="count" class="dim grow" role="status"></span>
<input id="filter" type="search" placeholder="Number, VM, state, image, error" aria-label="Filter the VMs">
</div>
<ul id="rows"></ul>
<p id="none" class="dim"></p>
</section>
{phone}</div>
</div>
</main>
<dialog id="details" aria-labelledby="who" closedby="any">
<div class="stack">
<form method="dialog" class="row">
<h2 id="who" class="grow" tabindex="-1" autofocus></h2>
<button class="flat">Close</button>
</form>
<div id="pairing" class="stack"></div>
<p id="trouble" class="error"></p>
<dl id="record"></dl>
<div id="changes">
<details name="change">
<summary>Change credentials</summary>
<form id="renew" class="stack">
<p>What you leave empty stays as it is. The VM restarts; its texts wait.</p>
<label>GitHub token
<input name="github_token" type="password" autocomplete="off"></label>
<strong>API keys</strong>
<button type="button" name="more" class="flat">+ Another key</button>
<button class="go">Change credentials</button>
</form>
</details>
</div>
<p id="news" role="status"></p>
<h3>Last texts since the gateway started</h3>
<ol id="texts"></ol>
</div>
</dialog>
<dialog id="make" aria-labelledby="make-title">
<form id="order" class="stack">
<h2 id="make-title">New VM</h2>
<label>Phone number
<input name="phone_number" inputmode="tel" placeholder="+1 555 010 0199" required></label>
<label>GitHub token
<input name="github_token" type="password" autocomplete="off" required></label>
<strong>API keys</strong>
<button type="button" name="more" value="ANTHROPIC_API_KEY" class="flat">+ Another key</button>
<label>Region
<select name="region" id="region"></select></label>
<label class="row">
<input name="welcome" type="checkbox" checked> Text a welcome when it is ready</label>
<label class="row">
<input name="verify" type="checkbox"> Run texts only once its phone sent a code</label>
<p id="order-words" role="alert" class="error"></p>
<button class="go">Set up</button>
<button type="button" id="close" class="flat">Close</button>
</form>
</dialog>
"""

PAGE_PHONE_PANE = """<section id="phone" class="card" aria-label="Phone">
<div class="bar row">
<input id="from" form="send" list="known" inputmode="tel" placeholder="+1 555 010 0199" aria-label="Number">
<datalist id="known"></datalist>
<button id="kill">Kill VM</button>
</div>
<div id="thread" role="log" aria-label="Texts" tabindex="0"></div>
<p id="phone-words" class="dim" role="status"></p>
<form id="send" class="bar row">
<input id="words" autocomplete="off" maxlength="1600" required placeholder="Text your VM">
<button class="go">Send</button>
</form>
</section>
"""

PAGE_FEED = r"""
'use strict';
const REMEDIES = [  // by code or state, and words
  [/^unauthorized/, 'Sign in with the key that COCKPIT_API_KEY holds now.'],
  [/^away/, 'Its texts are kept and run when it is back; if this lasts, restart it.'],
  [/^failed .*gone/, 'Tear it down, then set it up anew.'],
  [/ not paired/, 'Text the code in its details from that phone.'],
  [/ Twilio/, 'This goes away with the next answer that arrives.'],
  [/\/health/, 'VM_IMAGE must answer GET /health on port 3000.'],
  [/ no room/, 'Choose another region, or try again later.'],
  [/ Fly/, 'Check FLY_API_TOKEN and FLY_ORG; python cockpit.py doctor says more.'],
  [/^ready/, 'Try it again.'],
];
let key = sessionStorage.getItem('cockpit-key') || '';
let told = {};  // the last of each event
let feed = new AbortController();  // ends the one that is followed
let watch = 0;

const $ = id => document.getElementById(id);
const sleep = ms => new Promise(done => setTimeout(done, ms));
// Words from outside only ever become text: this page has no way to make markup of them.
function make(tag, given, ...kids) {
  const made = Object.assign(document.createElement(tag), given);
  made.append(...kids);
  return made;
}
function put(node, words) {
  if (node.textContent !== words) node.textContent = words;
}
const say = (id, words) => put($(id), words.toLocaleString('en'));
function draw(id, kids) {  // unless it is the same: it may be marked, to be copied
  const words = kids.map(kid => kid.textContent).join('');
  if ($(id).textContent !== words) $(id).replaceChildren(...kids);
}
const sentence = words => `${words[0].toUpperCase()}${words.slice(1)}.`.replace(/\.\.$/, '.');
function withRemedy(kind, words) {
  const fits = ([pattern]) => pattern.test(`${kind} ${words}`);
  const [, remedy = ''] = REMEDIES.find(fits) || [];
  return `${sentence(words)} ${remedy}`;
}

async function api(path, {headers: more, ...asked} = {}) {
  const headers = {Authorization: `Bearer ${key}`, 'Content-Type': 'application/json', ...more};
  const answer = await fetch(path, {...asked, headers});
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));  // a proxy's words need not be JSON
  throw {detail: `the gateway answered ${answer.status}`, ...problem};
}
const read = async (...asked) => (await api(...asked)).json();
const post = body => ({method: 'POST', body: JSON.stringify(body)});
function explain({code, detail}) {
  if (!detail) return 'The gateway did not answer. Check that it is running, then try again.';
  return withRemedy(code, code === 'unauthorized' ? 'that key is not accepted' : detail);
}

function showFaults(form, error) {  // each at its field; returns what to say of the whole
  for (const {field, message} of error.errors || []) {
    const names = [...form.querySelectorAll('[name=variable]')];
    const named = names.find(({value}) => `api_keys.${value.trim()}` === field);
    const input = form.elements[field] || named || names[0];
    const id = `${form.id}-${field}`;
    input.ariaInvalid = 'true';
    input.setAttribute('aria-describedby', id);
    const words = make('small', {id, className: 'fault'}, sentence(message));
    input.closest('label,.row').after(words);
  }
  const first = [...form.elements].find(({ariaInvalid}) => ariaInvalid);
  first?.focus();
  return first ? 'Correct what is marked.' : explain(error);
}
function onSubmit(id, wordsId, act) {
  const form = $(id);
  form.onsubmit = async event => {
    event.preventDefault();
    for (const fault of document.querySelectorAll('.fault')) fault.remove();
    for (const field of form.elements) field.ariaInvalid = null;
    say(wordsId, '');
    await act(form).catch(error => say(wordsId, showFaults(form, error)));
  };
}

function status(kind, words) {
  $('status').className = `dim grow ${kind}`;
  say('status', words);
}
function hear() {  // the feed ends when nothing arrives for 15 s
  clearTimeout(watch);
  watch = setTimeout(feed => feed.abort(), 15000, feed);
}
async function stream({signal}) {
  hear();
  const answer = await api('events', {headers: {Accept: 'text/event-stream'}, signal});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ''; ;) {
    const {value, done} = await reader.read();
    if (done) throw new Error('the stream ended');
    const blocks = (text + value).split('\n\n');
    text = blocks.pop();
    for (const block of blocks) {
      const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(block);
      told[name] = JSON.parse(data);
    }
    hear();
    if (!document.body.className) enter();
    status('live', 'Live');
    if (told.table) show();
  }
}
async function follow() {
  let mine;
  do {
    feed.abort();
    mine = feed = new AbortController();
    const error = await stream(mine).catch(error => error);
    if (mine !== feed) return;  // somebody signed in or out
    const isOut = !document.body.className || error.code === 'unauthorized';
    if (isOut) return leave(explain(error));
    status('lost', 'No connection, trying again');
    await sleep(2000);
  } while (mine === feed);
}
function enter() {
  document.body.className = 'in';
  $('new').focus();
}
function leave(why) {
  feed.abort();
  feed = new AbortController();
  key = '';
  told = {};
  sessionStorage.removeItem('cockpit-key');
  for (const dialog of document.querySelectorAll('dialog')) dialog.close();
  document.body.className = '';
  say('why', why);
  $('key').ariaInvalid = `${why !== ''}`;
  $('key').value = '';
  $('key').focus();
}
$('enter').onsubmit = event => {
  event.preventDefault();
  key = $('key').value.trim().replace(/[^!-~]/g, '?');  // a header holds ASCII only
  sessionStorage.setItem('cockpit-key', key);
  follow();
};
$('out').onclick = () => leave('');
"""

PAGE_BOARD = r"""
const UNITS = [[86400, 'd'], [3600, 'h'], [60, 'min'], [0, 's']];

const took = seconds => `${Number(seconds.toFixed(seconds < 10 ? 2 : 0))} s`;
const when = at => new Date(at).toLocaleString();
function since(at) {
  const seconds = Math.max(0, told.fleet.at - at);
  const [size, unit] = UNITS.find(([least]) => seconds >= least);
  return `${Math.floor(seconds / (size || 1))} ${unit}`;
}
function troubleOf(row) {
  const silent = row.away_since ? `no answer for ${since(row.away_since)}` : '';
  const words = row.last_error || silent || (row.paired ? '' : 'not paired yet');
  return words && withRemedy(row.state, words);
}
function stateOf({state, step, waiting, paired}) {
  const how = paired || state !== 'ready' ? state : 'not paired';
  return (step ? `${how}: ${step}` : how) + (waiting ? `, ${waiting} waiting` : '');
}
function drawFleet({fleet}) {
  const {vms, hour, waiting, median_s: median, p99_s: p99} = fleet;
  const sum = counts => counts.reduce((total, count) => total + count, 0);
  const states = Object.entries(vms).filter(([, count]) => count);
  const all = hour.map(sum);
  const failed = hour.map(([, count]) => count);
  const most = Math.max(4, ...all);
  const words = {
    mode: `${fleet.mode} ${fleet.number}`,
    vms: sum(Object.values(vms)),
    states: states.map(([state, count]) => `${count} ${state}`).join(' · ') || 'none yet',
    median: median === null ? '–' : took(median),
    p99: median === null ? 'no answers yet' : `half of them; 99 % in ${took(p99)}`,
    waiting,
    oldest: waiting ? `oldest ${took(fleet.oldest_s)}` : 'nothing waits',
    rate: `${fleet.texts_a_minute} texts a minute`,
    'all-sum': `${sum(all)} in the last hour`,
    'failed-sum': `${sum(failed)} failed`,
    most,
  };
  for (const id in words) say(id, words[id]);
  for (const [id, counts] of Object.entries({all, failed})) {
    const bars = counts.map((count, at) => `M${at * 6 + 3} 56v-${count / most * 56}`);
    $(id).setAttribute('d', bars.join(''));
  }
  draw('troubles', fleet.troubles.map(words => make('li', {}, words)));
  const regions = fleet.regions.map(code => make('option', {}, code));
  draw('region', [make('option', {value: ''}, 'As configured'), ...regions]);
}

const masked = number => `***${number.replace(/\D/g, '').slice(-4)}`;  // as the feed does
const rank = row => (troubleOf(row) ? 0 : row.waiting ? 1 : 2);
function newLine(row) {
  const onclick = () => showDetails(row);
  return make('li', {id: `row-${row.vm_id}`},
    make('button', {className: 'who', ariaHasPopup: 'dialog', onclick}, row.phone),
    make('code', {}, row.vm_id),
    make('span', {className: 'state'}),
    make('span', {className: 'spoke dim'}),
    make('p', {className: 'error'}));
}
function lineOf(row) {
  const line = $(`row-${row.vm_id}`) || newLine(row);
  const [, , state, spoke, trouble] = line.children;
  line.className = row.paired ? row.state : 'away';
  put(state, stateOf(row));
  put(spoke, row.last_text ? `${since(row.last_text)} ago` : 'no text lately');
  put(trouble, troubleOf(row));
  return line;
}
function drawTable({table: {rows, is_whole}}) {
  const given = $('filter').value.trim().toLowerCase();
  const needle = given.replace(/^\+?[\d .()-]{7,}$/, masked);
  const isFound = row => Object.values(row).join(' ').toLowerCase().includes(needle);
  const lines = rows.filter(isFound).sort((a, b) => rank(a) - rank(b)).map(lineOf);
  const old = $('rows').children;
  if (lines.length !== old.length || lines.some((line, at) => line !== old[at])) {
    const focused = document.activeElement;  // moving a line takes the focus from it
    $('rows').replaceChildren(...lines);
    (focused.isConnected ? focused : $('filter')).focus();
  }
  const part = is_whole ? '' : `the first ${rows.length}`;
  say('count', [needle && `${lines.length} found`, part].filter(Boolean).join(' in '));
  const none = needle ? 'No VM matches.' : 'No VMs yet: New VM sets one up.';
  say('none', lines.length ? '' : none);
}
function show() {
  drawFleet(told);
  drawTable(told);
  if ($('details').open) readVm();
}
$('filter').oninput = () => told.table && drawTable(told);
"""

PAGE_ACTIONS = r"""
const CHANGES = {
  Lock: 'Runs nothing more until its phone texts a new pairing code. Texts that wait are dropped.',
  Restart: 'What it runs now is cut off and handed over again. Texts wait.',
  Upgrade: 'Moves it to the present VM_IMAGE, and back if that does not answer. Texts wait.',
  'Tear down': 'Destroys it and its disk, frees its number, drops texts that wait. This cannot be undone.',
};
const STEPS = ['app', 'secrets', 'address', 'volume', 'machine', 'start', 'health'];
const RECORD = {
  vm_id: 'VM',
  machine_id: 'Machine',
  vm_url: 'Address',
  region: 'Region',
  image: 'Image',
  created_at: 'Created',
  steps: 'Steps',
  awake_s: 'Awake',
};
let shown = {};  // the row whose details are open

function stepsOf({state, step, steps = {}}) {
  const now = STEPS.includes(step) ? STEPS.indexOf(step) : 9;
  return STEPS.map((name, at) => {
    const time = name in steps ? ` ${took(steps[name])}` : '';
    const mark = at < now ? '✓' : at > now ? '○' : state === 'failed' ? '✗' : '●';
    return `${mark}\u00a0${name}${time}`;
  }).join(', ');
}
function newText({message_sid, outcome, steps, errors}) {
  const ways = steps.slice(1).map(({step, ms}) => `${step} after ${took(ms / 1000)}`);
  const words = `${when(steps[0].at)}: ${outcome}`;
  return make('li', {}, words.replace('_', ' '),
    make('small', {}, ways.join(', ').replaceAll('_', ' ')),
    ...errors.map(({error}) => make('small', {className: 'error'}, error)),
    make('code', {}, message_sid));
}
function drawDetails(vm) {
  const {error, vm_id, paired, pairing_code: code, texts = []} = vm;
  const facts = {
    ...vm,
    created_at: when(vm.created_at),
    steps: stepsOf(vm),
    awake_s: vm.awake_s >= 0 && `${(vm.awake_s / 3600).toFixed(1)} h in all`,
  };
  const known = Object.entries(RECORD).filter(([name]) => vm_id && facts[name]);
  const line = ([name, title]) => [make('dt', {}, title), make('dd', {}, facts[name])];
  const remedy = 'Text this code from that phone to connect it. Until then nothing of it is run.';
  const pairing = [make('b', {className: 'code'}, code), make('p', {}, remedy)];
  say('who', error ? shown.phone : `${vm.phone}: ${stateOf(vm)}`);
  say('trouble', error ? explain(error) : troubleOf(vm));
  draw('pairing', code && !paired ? pairing : []);
  draw('record', known.flatMap(line));
  draw('texts', texts.map(newText));
}
async function readVm() {
  const {vm_id} = shown;
  shown = told.table?.rows.find(row => row.vm_id === vm_id) || shown;
  const vm = await read(`provision/${vm_id}`).catch(error => ({error}));
  if (vm_id === shown.vm_id) drawDetails(vm.error ? vm : {...shown, ...vm});
}
async function showDetails(row) {
  shown = row;
  say('news', '');
  $('renew').reset();
  for (const more of $('changes').children) more.open = false;
  await readVm();
  $('details').showModal();
}
$('details').onclose = () => {  // its row may be gone
  const row = $(`row-${shown.vm_id}`) || $('rows').firstChild;
  (row?.firstChild || $('new')).focus();
};

async function change(title, call, form) {
  const what = `${title}, ${shown.phone}`;
  say('news', `${what}: under way.`);
  try {
    const {status} = await call(`provision/${shown.vm_id}`);
    form?.reset();
    const unsure = 'Fly has not confirmed yet; it is asked until it has.';
    say('news', `${what}: ${status === 202 ? unsure : 'done.'}`);
  } catch (error) {
    say('news', `${what}: ${form ? showFaults(form, error) : explain(error)}`);
  }
  readVm();
}
for (const [title, words] of Object.entries(CHANGES)) {
  const call = path => title === 'Tear down'
    ? api(path, {method: 'DELETE'})
    : api(`${path}/${title.toLowerCase()}`, post({}));
  const onclick = () => change(title, call);
  $('changes').append(make('details', {name: 'change'},
    make('summary', {}, title),
    make('p', {}, words),
    make('button', {className: 'go', onclick}, title)));
}

function readForm(form) {
  const given = new FormData(form);
  const values = given.getAll('value');
  const pairs = given.getAll('variable').map((name, at) => [name.trim(), values[at]]);
  const api_keys = Object.fromEntries(pairs.filter(([name, value]) => name || value));
  const filled = [...given].filter(([, value]) => value);
  const {variable, value, ...order} = Object.fromEntries(filled);
  order.welcome &&= true;
  order.verify &&= true;
  return Object.keys(api_keys).length ? {...order, api_keys} : order;
}
function addPair(more, defaultValue) {
  const secret = {type: 'password', autocomplete: 'off', ariaLabel: 'Value of the variable'};
  more.before(make('div', {className: 'pair row'},
    make('input', {name: 'variable', defaultValue, ariaLabel: 'Name of the variable'}),
    make('input', {name: 'value', ...secret})));
}
for (const more of document.getElementsByName('more')) {
  addPair(more, more.value);
  more.onclick = () => {
    addPair(more, '');
    more.previousElementSibling.firstElementChild.focus();
  };
}
onSubmit('renew', 'news', form => {
  const call = path => api(path, {...post(readForm(form)), method: 'PATCH'});
  return change('Change of credentials', call, form);
});
onSubmit('order', 'order-words', async form => {
  const headers = {Prefer: 'respond-async'};
  const vm = await read('provision', {...post(readForm(form)), headers});
  form.reset();
  if ($('from')) $('from').value = vm.phone_number;
  $('make').close();
  showDetails({...vm, phone: 'New VM'});
});
$('new').onclick = () => $('make').showModal();
$('close').onclick = () => $('make').close();
document.body.className = key && 'in';
if (key) follow();
"""

PAGE_PHONE = r"""
const NOTICE = /^(Your (VM|queue) |Not run|No answer after|Still working)/;
let vms = [];
let threadOf = '';
const number = () => $('from').value.replace(/[ .()-]/g, '');
function bubble({date_created: at, body, direction, media}) {
  const pictures = media.map(url => {
    const {pathname, search} = new URL(url, location);
    return make('img', {src: pathname + search, alt: 'Picture'});
  });
  const className = direction === 'out' && NOTICE.test(body) ? 'note' : direction;
  const time = make('time', {}, new Date(at).toLocaleTimeString());
  return make('div', {className}, body, ...pictures, time);
}
async function readThread() {
  const list = $('thread');
  ({vms} = await read('provision?limit=200'));  // the feed masks numbers
  draw('known', vms.map(vm => make('option', {}, vm.phone_number)));
  if (document.activeElement !== $('from')) $('from').value ||= vms[0]?.phone_number || '';
  const phone = number();
  if (phone !== threadOf) list.replaceChildren();
  threadOf = phone;
  const {texts} = await read(`_local/texts?phone=${encodeURIComponent(phone)}`);
  const news = texts.slice(list.children.length);
  list.append(...news.map(bubble));
  if (news.length) list.scrollTop = list.scrollHeight;
}
async function followThread() {
  for (;; await sleep(800)) {
    if (key) await readThread().catch(() => {});  // the feed says what is wrong
  }
}
onSubmit('send', 'phone-words', async () => {
  const body = $('words').value;
  $('words').value = '';
  const sent = read('_local/texts', post({from: number(), body}));
  const {webhook_status: code} = await sent.catch(error => {
    $('words').value = body;
    throw error;
  });
  if (code !== 200) throw {detail: `the gateway answered this text with ${code}; its log says why`};
});
$('kill').onclick = async () => {
  const vm = vms.find(known => known.phone_number === number());
  if (!vm) return say('phone-words', 'This number has no VM. New VM sets one up.');
  const words = 'Its process is killed and starts again in 2 s. Text it meanwhile: nothing is lost.';
  const end = api(`_local/vms/${vm.vm_id}/kill`, post({})).then(() => words, explain);
  say('phone-words', await end);
};
const toPhone = {id: 'to-phone', onclick: () => $('words').focus()};
$('out').before(make('button', toPhone, 'Phone'));
followThread();
"""


# --- Description ---
#
# The table of the HTTP interface, and /openapi.json made of it; Twilio's own fields are left to Twilio.

STATES = ("provisioning", "ready", "asleep", "away", "deleting", "failed")


def object_schema(fields: Fields, **more: Any) -> Json:
    """Of fields by name; `?` marks one that is not always there."""
    properties = {name.rstrip("?"): schema for name, schema in fields.items()}
    required = [name for name in fields if not name.endswith("?")]
    return OBJECT | {"properties": properties, "required": required, **more}


def content_of(schema: str, kind: str = JSON_TYPE) -> Json:
    """A body that is one of ANSWERS."""
    return {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def parameter(place: str, name: str, schema: Json = TEXT) -> Json:
    is_required = not name.endswith("?")
    return {"in": place, "name": name.rstrip("?"), "required": is_required, "schema": schema}


RECORD = content_of("VM")
ANY_JSON: Json = {JSON_TYPE: {}}
ANSWERS: dict[str, Fields] = {
    "VM": {
        **dict.fromkeys(("vm_id", "phone_number"), TEXT),
        **dict.fromkeys(("machine_id", "vm_url", "region", "image", "step"), TEXT_OR_NULL),
        **dict.fromkeys(("created_at", "last_error"), TEXT_OR_NULL),
        "state": {"enum": STATES},
        "steps?": OBJECT,
        "texts?": LIST | {"items": OBJECT},  # of one VM that is asked for by itself
        "awake_s?": {"type": "integer"},
        "paired": {"type": "boolean"},
        "pairing_code?": TEXT,
    },
    "VMs": {"vms": LIST | {"items": RECORD[JSON_TYPE]["schema"]}, "next": TEXT_OR_NULL},
    "Problem": {
        **dict.fromkeys(("type", "title", "detail", "vm_id?"), TEXT),
        "status": {"type": "integer"},
        "code": {"enum": list(STATUS_OF)},
        "errors?": LIST | {"items": object_schema({"field": TEXT, "message": TEXT})},
    },
}
PROBLEM = {"description": "a problem (RFC 9457)", "content": content_of("Problem", PROBLEM_TYPE)}
BEARER = {"type": "http", "scheme": "bearer"}
KEYS: Json = {
    **dict.fromkeys(("api_key", "vm_token", "metrics_token"), BEARER),
    "x_api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


class Call(NamedTuple):
    """A call of the HTTP interface: who serves it, and what is said of it."""

    name: str  # method and path
    handler: Handler
    summary: str
    # Their content; whatever else is answered is a problem.
    answers: Mapping[int, Json]
    fields: Mapping[str, Json] = {}  # of the body
    parameters: Sequence[Json] = ()
    keys: Sequence[str] = ("api_key", "x_api_key")  # any opens it; "": so may none

    def route(self) -> web.RouteDef:
        method, path = self.name.split()
        return web.route(method, path, self.handler)

    def operation(self) -> Json:
        """The call as OpenAPI describes it."""
        parts = [parameter("path", part) for part in re.findall("{(.*?)}", self.name)]
        described: Json = {
            "summary": self.summary,
            "security": [{key: []} if key else {} for key in self.keys],
            "parameters": [*parts, *self.parameters],
            "responses": {"default": PROBLEM},
        }
        for status, content in self.answers.items():
            answer = {"description": HTTPStatus(status).phrase, "content": content}
            described["responses"][str(status)] = answer
        if self.fields:
            schema = object_schema(self.fields, additionalProperties=False, minProperties=1)
            content = {JSON_TYPE: {"schema": schema}}
            described["requestBody"] = {"required": True, "content": content}
        return described


def describe_api(calls: Iterable[Call], url: str) -> Json:
    """The OpenAPI document of calls, from the tables that serve and check them."""
    paths = defaultdict[str, Json](dict)
    for call in calls:
        method, path = call.name.split()
        paths[path][method.lower()] = call.operation()
    schemas = {name: object_schema(fields) for name, fields in ANSWERS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "cockpit", "version": VERSION},
        "servers": [{"url": url}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": KEYS},
    }


async def get_openapi(request: web.Request) -> web.Response:
    return json_response(describe_api(CALLS, request.app[SETTINGS].gateway.public_url))


VM_PATH = "/provision/{vm_id}"
RESTART, UPGRADE = (functools.partial(change_vm, what=what) for what in ("restart", "upgrade"))
NO_WAIT = (parameter("header", "Prefer?", TEXT | {"examples": ["respond-async"]}),)
ONCE = (parameter("header", "Idempotency-Key?", TEXT | {"maxLength": 128}),)
LISTED = [parameter("query", name, schema) for name, schema in PAGING.items()]
CHANGED, ONE, SOME = {200: RECORD, 202: RECORD}, {200: RECORD}, {200: ANY_JSON}
IMAGES: Json = {f"image/{kind}": {} for kind in ("png", "jpeg", "gif")}
IMAGES["application/octet-stream"] = {}
MADE = {200: {SSE_TYPE: {}}, 201: RECORD, 202: RECORD}
# The HTTP interface; /openapi.json is made of this.
CALLS = (
    Call("POST /provision", post_provision, "Make a VM for a phone", MADE, ORDER_FIELDS, NO_WAIT),
    Call(
        "GET /provision",
        get_provisions,
        "VMs, in order of vm_id",
        {200: content_of("VMs")},
        {},
        LISTED,
    ),
    Call(f"GET {VM_PATH}", get_provision, "One VM", ONE),
    Call(
        f"PATCH {VM_PATH}",
        patch_provision,
        "Replace credentials, restart",
        CHANGED,
        NEW_CREDENTIALS,
        NO_WAIT,
    ),
    Call(f"DELETE {VM_PATH}", delete_provision, "Tear down", {202: RECORD, 204: {}}),
    Call(f"POST {VM_PATH}/restart", RESTART, "Restart", CHANGED, {}, NO_WAIT),
    Call(f"POST {VM_PATH}/upgrade", UPGRADE, "Move to VM_IMAGE", CHANGED, {}, NO_WAIT),
    Call(f"POST {VM_PATH}/lock", lock_vm, "Run nothing until the new code is texted", ONE),
    Call("POST /sms", post_sms, "Twilio: a text", {200: {"text/xml": {}}}, keys=()),
    Call("POST /sms/status", post_sms_status, "Twilio: a delivery", {204: {}}, keys=()),
    Call(
        "POST /messages",
        post_messages,
        "A VM texts its owner",
        {202: ANY_JSON},
        VM_MESSAGE,
        ONCE,
        ("vm_token",),
    ),
    Call("GET /messages/{sid}", get_message, "A text's way", SOME),
    Call(
        "GET /media/{signed}",
        get_media,
        "A picture, for who has its link",
        {200: IMAGES},
        keys=(),
    ),
    Call(
        "GET /health",
        get_health,
        "How it is, and its troubles",
        {200: ANY_JSON, 503: ANY_JSON},
        keys=(),
    ),
    Call(
        "GET /metrics",
        get_metrics,
        "Prometheus text",
        {200: {"text/plain": {}}},
        keys=("", "metrics_token"),
    ),
    Call(
        "GET /events",
        get_events,
        "The live feed of the page",
        {200: {JSON_TYPE: {}, SSE_TYPE: {}}},
    ),
    Call("GET /", get_page, "The operator's page", {200: {"text/html": {}}}, keys=()),
    Call("GET /openapi.json", get_openapi, "This document", SOME, keys=()),
)


# --- Local world ---

THIS_FILE = os.path.realpath(__file__)
PASSED_ON = ("PATH", "HOME", "LANG", "TERM", "TMPDIR")
RESTART_PAUSE_S = 1.0
FORGET_IT = f"put back a good copy, or forget the local world: rm -r {LOCAL_FOLDER}"
FLY_ROOT, TWILIO_ROOT = "/_local/fly/v1", "/_local/twilio"


@web.middleware
async def loopback_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Local mode hands out a shell: no tunnel, no proxy and no page elsewhere may use it."""
    gateway = request.app[SETTINGS].gateway
    is_local_path = request.path.startswith("/_local")
    host = re.sub(r":[0-9]*$", "", request.headers.get("Host", "")).lower()
    is_at_home = is_loopback(urlsplit(gateway.public_url).hostname or "")
    # A page elsewhere may point its own name at this machine (DNS rebinding).
    if (is_local_path or is_at_home) and not is_loopback(host):
        raise Refusal("forbidden", f"in local mode use http://127.0.0.1:{gateway.port}")
    if is_local_path:
        names = [name.lower() for name in request.headers]
        is_forwarded = any(name.startswith(("forwarded", "x-forwarded")) for name in names)
        if is_forwarded or not is_loopback(request.remote or ""):
            raise Refusal("forbidden", "/_local answers this machine only, without a proxy")
        # A page elsewhere may post a form without being asked, but not JSON.
        is_form = request.method == "POST" and request.content_type != JSON_TYPE
        if is_form and request.can_read_body and not request.path.startswith(TWILIO_ROOT):
            raise Refusal("unsupported_media_type", f"send Content-Type: {JSON_TYPE}")
    return await handler(request)


def require_authorization(request: web.Request, wanted: str) -> None:
    if request.headers.get("Authorization") != wanted:
        raise unauthorized("the stand-ins answer this gateway only")


def make_private_folder(folder: Path) -> None:
    """Make it, for this user alone (blocking); raises StoreError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise StoreError(f"the folder {folder} cannot be made: {error.strerror}") from error


def open_to_append(file: Path) -> int:
    """Open a file for this user alone, made if need be (blocking)."""
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def signal_session(leader: int, number: int) -> list[tuple[int, str]]:
    """Signal a process and whatever it started in its session, agents too (blocking).

    Returns the id and the start time of each; nothing elsewhere than on Linux.
    """
    signal_group(leader, number)
    members = [process for process in processes() if process.session == leader]
    for process in members:
        with suppress(OSError):
            os.kill(process.id, number)
    return [(process.id, process.started) for process in members]


def end_stopped(stopped: Iterable[tuple[int, str]]) -> None:
    """End what a killed gateway left stopped: it cannot see that its gateway is gone (blocking)."""
    known = {tuple(one) for one in stopped}  # JSON knows lists only
    for process in processes():
        if (process.id, process.started) in known:
            with suppress(OSError):
                os.kill(process.id, signal.SIGKILL)


@dataclass(slots=True, kw_only=True, eq=False)
class LocalVm:
    """An app of the stand-in for Fly, and its machine: a child process in a folder of its own."""

    app: str
    agent: str
    secrets: dict[str, str] = field(default_factory=dict)
    machine: Json = field(default_factory=dict)  # as Fly shows it; empty until it is made
    stopped: list[tuple[int, str]] = field(default_factory=list)  # processes, while suspended
    port: int = 0
    process: asyncio.subprocess.Process | None = None
    keeper: asyncio.Task[None] | None = None

    KEPT = ("app", "secrets", "machine", "stopped")

    @property
    def folder(self) -> Path:
        return LOCAL_FOLDER / "vms" / self.app

    def become(self, state: str) -> None:
        self.machine |= {"state": state, "events": [{"id": secrets.token_hex(13)}]}

    # Its process

    async def keep(self) -> None:
        """The restart policy `always`."""
        REQUEST_ID.set("")  # it outlives the request that happened to start it
        while True:
            try:
                ended: Json = {"exit_code": await self.live()}
            except (OSError, StoreError) as error:
                ended = {"error": str(error)}
            log_event("local_vm_exited", vm_id=self.app, **ended, restarts_in_s=RESTART_PAUSE_S)
            await asyncio.sleep(RESTART_PAUSE_S)

    async def live(self) -> int:
        """One life of the process; returns its exit code."""
        self.port = await asyncio.to_thread(free_port)
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--until-stdin-closes"]
        if self.agent:
            arguments += ["--agent", self.agent]
        environ = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        await asyncio.to_thread(make_private_folder, self.folder)
        output = await asyncio.to_thread(open_to_append, self.folder / "vm.log")
        try:
            # Its standard input closes with this process, however that ends: then it ends too.
            self.process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, THIS_FILE, "vm", *arguments),
                cwd=self.folder,
                env=environ | self.secrets,
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        finally:
            os.close(output)
        self.become("started")
        try:
            return await process.wait()
        finally:
            self.process, self.machine["state"] = None, "starting"
            await asyncio.to_thread(signal_session, process.pid, signal.SIGKILL)
            await process.wait()

    async def stop(self) -> None:
        if self.keeper is not None:
            self.keeper.cancel()
            await asyncio.wait({self.keeper})
            self.keeper = None

    # What Fly is asked of it

    async def start(self) -> None:
        if self.keeper is None:
            self.keeper = asyncio.create_task(self.keep(), name=f"keep {self.app}")
        elif self.process is not None and self.machine["state"] == "suspended":
            self.become("started")
            await asyncio.to_thread(signal_session, self.process.pid, signal.SIGCONT)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def suspend(self) -> Any:
        """Its processes stop where they are: memory survives."""
        if self.process is None or self.machine["state"] != "started":
            return 412, {"error": f"failed_precondition: {self.machine['state']}"}
        self.become("suspended")
        leader = self.process.pid
        self.stopped = await asyncio.to_thread(signal_session, leader, signal.SIGSTOP)
        return {}

    async def wait(self, asked: Json) -> Any:
        machine, until = self.machine, time.monotonic() + float(asked["timeout"])
        while time.monotonic() < until:
            is_new = machine["events"][0]["id"] != asked.get("from_event_id")
            if is_new and machine["state"] == asked["state"]:
                return {}
            await asyncio.sleep(0.05)
        return 408, {"error": f"deadline_exceeded: {machine['state']}"}

    async def create(self, asked: Json) -> Json:
        self.machine |= {
            "id": secrets.token_hex(7),
            "app_name": self.app,
            "region": asked["region"].split(",")[0],
            "created_at": utc_seconds(time.time()),
        }
        return await self.update(asked)

    async def update(self, asked: Json) -> Json:
        await self.stop()
        self.machine |= {"config": asked["config"], "instance_id": secrets.token_hex(13)}
        self.become("starting")
        await self.start()
        return self.machine

    def set_secrets(self, asked: Json) -> Json:
        self.secrets |= asked["values"]
        return {"version": 1}

    def set_metadata(self, asked: Json) -> None:
        self.machine["config"].setdefault("metadata", {})[asked["name"]] = asked["value"]


class LocalFly:
    """A stand-in for Fly that speaks HTTP; its machines are `python cockpit.py vm` processes.

    Its records lie in .cockpit/fly.json, with the secrets of its apps.
    """

    def __init__(self, settings: Settings) -> None:
        self.authorization = fly_authorization(settings.fly.token)
        self.agent = settings.gateway.local_agent
        self.file = LOCAL_FOLDER / "fly.json"
        self.vms: dict[str, LocalVm] = {}
        self.saving = asyncio.Lock()

    def add_to(self, app: web.Application) -> None:
        root, machine = "/apps/{app}", "/apps/{app}/machines/{machine}"
        # Of an app and what is asked: body, query and path in one.
        table: dict[str, Callable[[LocalVm, Json], Any]] = {
            "POST /apps": self.create_app,
            "GET /apps": lambda *_: {"apps": [{"name": name} for name in self.vms]},
            "GET /orgs/{org}/machines": lambda *_: {
                "machines": [vm.machine for vm in self.vms.values() if vm.machine]
            },
            f"GET {root}": lambda vm, _: {"name": vm.app},
            f"DELETE {root}": self.delete_app,
            f"POST {root}/secrets": LocalVm.set_secrets,
            f"POST {root}/ip_assignments": lambda *_: None,
            f"POST {root}/volumes": lambda *_: {"id": "vol_local"},
            f"POST {root}/machines": LocalVm.create,
            f"GET {machine}": lambda vm, _: vm.machine,
            f"POST {machine}": LocalVm.update,
            f"GET {machine}/wait": LocalVm.wait,
            f"POST {machine}/start": lambda vm, _: vm.start(),
            f"POST {machine}/suspend": lambda vm, _: vm.suspend(),
            f"POST {machine}/restart": lambda vm, _: vm.restart(),
            f"POST {machine}/metadata/{{name}}": LocalVm.set_metadata,
        }
        for call, act in table.items():
            method, path = call.split(" ")
            handler = functools.partial(self.answer, act)
            app.router.add_route(method, FLY_ROOT + path, handler)
        app.router.add_route("*", "/_local/vm/{app}{path:/.*}", self.proxy)
        app.router.add_post("/_local/vms/{app}/kill", self.kill)
        app.cleanup_ctx.append(self.hold)

    async def answer(
        self, call: Callable[[LocalVm, Json], Any], request: web.Request
    ) -> web.Response:
        """Each call: authorized, about what exists, kept on disk before it is answered."""
        require_authorization(request, self.authorization)
        names = request.match_info
        vm = self.vms.get(names["app"]) if "app" in names else LocalVm(app="", agent="")
        if vm is None or names.get("machine") not in (None, vm.machine.get("id")):
            return web.json_response({"error": "not found"}, status=404)
        body = await read_json(request, PROVISION_BODY_BYTES) if request.can_read_body else {}
        answer = call(vm, {**body, **request.query, **names})
        if asyncio.iscoroutine(answer):
            answer = await answer
        if request.method != "GET":
            await self.save()
        status, value = answer if isinstance(answer, tuple) else (200, answer or {})
        return web.json_response(value, status=status)

    def create_app(self, _: LocalVm, asked: Json) -> None:
        self.vms.setdefault(asked["name"], LocalVm(app=asked["name"], agent=self.agent))

    async def delete_app(self, vm: LocalVm, _: Json) -> None:
        self.vms.pop(vm.app, None)
        await vm.stop()
        await asyncio.to_thread(shutil.rmtree, vm.folder, ignore_errors=True)

    # Lasting

    async def save(self) -> None:
        async with self.saving:
            kept = [{name: getattr(vm, name) for name in vm.KEPT} for vm in self.vms.values()]
            content = to_json({"vms": kept}).encode()
            await asyncio.to_thread(write_atomically, self.file, [content])

    async def hold(self, _: web.Application) -> AsyncIterator[None]:
        """Start again what ran when the last gateway ended; end every VM with this one."""
        with suppress(FileNotFoundError):
            stored = object_in(parse_json(await asyncio.to_thread(read_nofollow, self.file)))
            if "vms" not in stored:
                raise StoreError(f"{self.file} cannot be read; {FORGET_IT}")
            for record in stored["vms"]:
                vm = self.vms[record["app"]] = LocalVm(agent=self.agent, **record)
                await asyncio.to_thread(end_stopped, vm.stopped)
                if vm.machine and vm.machine["state"] not in RESTING:
                    await vm.start()
        try:
            yield
        finally:
            for vm in self.vms.values():
                await vm.stop()

    # A VM's own address

    async def proxy(self, request: web.Request) -> web.StreamResponse:
        """As Fly's: 503 while nothing listens; a connection that the VM drops is dropped here too."""
        vm = self.vms.get(request.match_info["app"])
        if vm and vm.machine.get("state") == "suspended":
            await vm.start()  # as `autostart` does
        if vm is None or vm.process is None:
            return web.Response(status=503)
        url = f"http://127.0.0.1:{vm.port}{request.match_info['path']}"
        passed = ("Authorization", "Content-Type", "Idempotency-Key")
        headers = {name: request.headers[name] for name in passed if name in request.headers}
        more: Any = {"data": await request.read(), "timeout": aiohttp.ClientTimeout(total=None)}
        try:
            async with aiohttp.request(request.method, url, headers=headers, **more) as answer:
                content = await read_at_most(answer, MAX_UPSTREAM_BYTES)
                kind = answer.content_type
                return web.Response(status=answer.status, body=content, content_type=kind)
        except aiohttp.ClientConnectorError:
            return web.Response(status=503)
        except aiohttp.ClientError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=502)

    async def kill(self, request: web.Request) -> web.Response:
        require_key(request)
        vm = self.vms.get(request.match_info["app"])
        if vm is None:
            raise Refusal("unknown_vm", "there is no such VM here")
        if vm.process is not None:
            signal_group(vm.process.pid, signal.SIGKILL)
        return web.Response(status=204)


SILENCE = (
    "No answer: this number has no VM (it is told ONBOARDING_URL once an hour, if that is set)."
)
LOCAL_TEXT: Fields = {
    "from": text_like(PHONE.pattern, "a phone number such as +15551234567"),
    "body": TEXT,
}


class LocalTwilio:
    """A stand-in for Twilio that speaks HTTP: takes messages, signs and delivers texts, keeps threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        twilio = settings.twilio
        self.authorization = basic_auth(twilio.account_sid, twilio.auth_tokens[0])
        self.file = LOCAL_FOLDER / "twilio.jsonl"
        self.messages: deque[Json] = deque(maxlen=10_000)

    def add_to(self, app: web.Application) -> None:
        messages = TWILIO_ROOT + "/2010-04-01/Accounts/{account}/Messages.json"
        app.router.add_post(messages, self.create)
        app.router.add_get(messages, self.list)
        app.router.add_post("/_local/texts", self.send_text)
        app.router.add_get("/_local/texts", self.show_thread)
        app.cleanup_ctx.append(self.hold)

    async def hold(self, _: web.Application) -> AsyncIterator[None]:
        """The threads of the last time are there again."""
        with suppress(FileNotFoundError):
            lines = (await asyncio.to_thread(read_nofollow, self.file)).splitlines()
            self.messages.extend(message for line in lines if (message := parse_json(line)))
        yield

    async def record(
        self, direction: str, sender: str, recipient: str, body: str, media: Sequence[str] = ()
    ) -> Json:
        message = {
            "sid": f"SM{secrets.token_hex(16)}",
            "direction": direction,
            "from": sender,
            "to": recipient,
            "body": body,
            "media": media,
            "date_created": format_datetime(datetime.now(UTC)),
        }
        self.messages.append(message)
        await asyncio.to_thread(self.append, to_json(message).encode() + b"\n")
        return message

    def append(self, line: bytes) -> None:
        with os.fdopen(open_to_append(self.file), "ab") as log:
            log.write(line)

    async def create(self, request: web.Request) -> web.Response:
        require_authorization(request, self.authorization)
        form = await request.post()
        sender, recipient, body = (str(form.get(name, "")) for name in ("From", "To", "Body"))
        media = [str(url) for url in form.getall("MediaUrl", [])]
        message = await self.record("outbound-api", sender, recipient, body, media)
        return web.json_response(message, status=201)

    async def list(self, request: web.Request) -> web.Response:
        require_authorization(request, self.authorization)
        wanted = {
            name.lower(): request.query[name] for name in ("To", "From") if name in request.query
        }
        found = [m for m in reversed(self.messages) if wanted.items() <= m.items()]
        return web.json_response({"messages": found[:1000]})

    async def send_text(self, request: web.Request) -> web.Response:
        """Send a text as a phone would."""
        require_key(request)
        body = await read_json(request, SMS_BODY_BYTES)
        FieldErrors(body, LOCAL_TEXT).check()
        phone, words, number = body["from"], body["body"], self.settings.twilio.phone_number
        message = await self.record("inbound", phone, number, words)
        status, document = await self.deliver(message)
        replies = re.findall(r"<Message>(.*?)</Message>", document, re.DOTALL)
        for reply in replies:
            await self.record("outbound-reply", number, phone, html.unescape(reply))
        is_known = replies or phone in request.app[GATEWAY].routes.routes
        said, note = words.strip().upper(), "" if is_known else SILENCE
        if said in KEYWORDS and said != "YES":
            note = f"Twilio itself answers {KEYWORDS[said]}."
        if note:
            await self.record("note", number, phone, note)
        return json_response({"sid": message["sid"], "webhook_status": status}, status=201)

    async def deliver(self, message: Json) -> tuple[int, str]:
        """Call the gateway's own webhook, signed; its status and answer."""
        twilio, gateway = self.settings.twilio, self.settings.gateway
        form = {name.capitalize(): message[name] for name in ("from", "to", "body")}
        form |= {"MessageSid": message["sid"], "AccountSid": twilio.account_sid}
        signed = twilio.auth_tokens[0], gateway.public_url + "/sms", form.items()
        more: Any = {"headers": {"X-Twilio-Signature": twilio_signature(*signed)}}
        more["timeout"] = aiohttp.ClientTimeout(total=15)
        url = f"http://127.0.0.1:{gateway.port}/sms"
        async with aiohttp.request("POST", url, data=form, **more) as answer:
            return answer.status, await answer.text()

    async def show_thread(self, request: web.Request) -> web.Response:
        """One phone's thread, both directions, oldest first."""
        require_key(request)
        phone = request.query.get("phone", "").replace(" ", "+")
        ways = {"inbound": "in", "note": "note"}
        texts = [
            message | {"direction": ways.get(message["direction"], "out")}
            for message in self.messages
            if phone in (message["from"], message["to"])
        ]
        return json_response({"texts": texts})


def add_local_world(app: web.Application, settings: Settings) -> None:
    """The stand-ins for whichever cloud is not configured; after the gateway's context, which locks."""
    if settings.fly.is_local:
        LocalFly(settings).add_to(app)
    if settings.twilio.is_local:
        LocalTwilio(settings).add_to(app)


# --- Assembly ---

UNREAD_MS = 30_000
STAND_IN = "not checked: the stand-in is used"


async def open_clouds(
    stack: contextlib.AsyncExitStack, settings: Settings, clock: Clock, metrics: Metrics
) -> tuple[FlyClient, TwilioClient]:
    """Clients whose connections end with `stack`."""

    async def upstream(dialect: Dialect, limit: int, jar: Any) -> Upstream:
        sessions = {}
        for is_fresh in (False, True):
            connector = aiohttp.TCPConnector(limit=limit, force_close=is_fresh)
            session = aiohttp.ClientSession(connector=connector, cookie_jar=jar)
            sessions[is_fresh] = await stack.enter_async_context(session)
        return Upstream(sessions[False], sessions[True], dialect, clock, metrics)

    # A fresh app is visible to who sends Fly's cookies back; `unsafe`: to bare addresses, too.
    fly = await upstream(FLY, 100, aiohttp.CookieJar(unsafe=True))
    twilio = await upstream(TWILIO, 1000, aiohttp.DummyCookieJar())
    budget_s = settings.limits.provision_timeout_s
    return FlyClient(fly, settings.fly, budget_s=budget_s), TwilioClient(twilio, settings.twilio)


def state_path(settings: Settings) -> Path:
    return Path(os.path.realpath(settings.gateway.routes_file))


async def run_gateway(app: web.Application) -> AsyncIterator[None]:
    """Bring the parts up in order, and down in the reverse; holds the state files."""
    settings, clock, metrics = app[SETTINGS], app[CLOCK], app[METRICS]
    if not settings.gateway.is_production:
        await asyncio.to_thread(make_private_folder, LOCAL_FOLDER)
    path, disk = state_path(settings), Tasks()
    keyring = Keyring(settings.gateway.secrets)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(os.close, await asyncio.to_thread(lock_state, path))
        stack.push_async_callback(disk.close)
        routes = await asyncio.to_thread(RouteStore, path, clock, disk)
        stack.push_async_callback(routes.close)
        if routes.recovery_note:
            log_warning("routes_recovered", note=routes.recovery_note)
        messages = MessageStore(beside(path, ".db"), clock, disk, metrics)
        await messages.open()
        stack.push_async_callback(messages.close)
        fly, twilio = await open_clouds(stack, settings, clock, metrics)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, force_close=True, socket_factory=metered_socket
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )
        await stack.enter_async_context(session)
        vms = VmClient(session, keyring, clock, settings.limits.vm_command_timeout_s)
        gateway = app[GATEWAY] = Gateway(
            settings, clock, metrics, keyring, routes, messages, fly, twilio, vms, Tasks()
        )
        stack.push_async_callback(gateway.tasks.close)
        await move_old_journal(path, gateway)
        await bring_up(gateway)
        yield


async def move_old_journal(path: Path, gateway: Gateway) -> None:
    """What the first version left in flight goes into the database once."""
    journal = beside(path, ".journal")
    if not await asyncio.to_thread(journal.exists):
        return
    phone_of = {route.vm_id: phone for phone, route in gateway.routes.routes.items()}
    changes = list(journal_changes(await asyncio.to_thread(read_nofollow, journal), phone_of))
    log_warning("journal_moved", changes=len(changes), into=f"{path.name}.db")
    await gateway.messages.commit(*changes)
    await asyncio.to_thread(journal.rename, beside(journal, ".moved"))


async def bring_up(gateway: Gateway) -> None:
    """Go on where the last process ended, before the door opens."""
    settings, limits, routes = gateway.settings, gateway.settings.limits, gateway.routes
    if settings.gateway.is_production and not (routes.routes or routes.undo):
        await gateway.reconciler.adopt_at_start()
    if settings.fly.is_local:  # its VMs are reached at our own port, which may be a new one
        for phone, route in list(routes.routes.items()):
            url = gateway.blueprint.url(route.vm_id, route.machine_id, route.region)
            routes.put(phone, replace(route, vm_url=url))
    await gateway.relay.load()
    await gateway.provisioner.recover()
    gateway.changes.resume_all()
    if limits.reconcile_s:
        gateway.tasks.start(gateway.reconciler.run())
    if limits.vm_idle_s:
        gateway.tasks.start(gateway.sleeper.run())
    if limits.backfill_s:
        if not settings.twilio.is_local:
            await gateway.backfill.at_start()
        gateway.tasks.start(gateway.backfill.run())
    # Stand-ins are reached at our own port, on which `serve` listens first.
    if not settings.has_stand_in:
        gateway.relay.start()


async def drain(gateway: Gateway) -> None:
    """Stop taking in, finish what fits in DRAIN_S, leave the rest to the next start."""
    relay, provisioner = gateway.relay, gateway.provisioner
    relay.state.is_draining = provisioner.is_draining = True
    log_event("draining", waiting=relay.waiting(), provisioning=len(provisioner.running))
    with suppress(TimeoutError):
        async with asyncio.timeout(gateway.settings.limits.drain_s):
            await asyncio.gather(relay.drain(), provisioner.drain())
    await gateway.tasks.close()
    log_event("drained", waiting=relay.waiting())


def make_app(settings: Settings, clock: Clock | None = None) -> web.Application:
    """The whole gateway as an application; nothing starts before that does."""
    is_local = settings.has_stand_in
    fences = [loopback_only] if is_local else []
    app = web.Application(middlewares=[answer_errors, *fences])
    app[SETTINGS] = settings
    app[CLOCK] = clock or Clock()
    app[METRICS] = Metrics(app[CLOCK])
    app[STRANGERS] = SparingLog(app[CLOCK])
    hint = "It is what COCKPIT_API_KEY holds where this gateway runs."
    if LOCAL_KEY in settings.gateway.api_keys:
        hint = "In local mode it is: local"
    app[PAGE] = render_page(with_phone=settings.twilio.is_local, hint=hint)
    app.add_routes([call.route() for call in CALLS])
    app.cleanup_ctx.append(run_gateway)
    if is_local:
        add_local_world(app, settings)
    return app


class Connection(web.RequestHandler):
    """aiohttp's, but a problem document that echoes nothing answers what it cannot parse."""

    def __init__(self, server: web.Server, strangers: SparingLog) -> None:
        options: Json = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": 15,
            "lingering_time": 2,  # for the rest of a refused body
            "max_line_size": 16 * 1024,
            "max_field_size": 8 * 1024,
            "max_headers": 64,
            "read_bufsize": 4 * 1024,  # of a body that waits for its turn
        }
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.strangers = strangers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Who reads no answer does not stay for ever.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            endpoint = transport.get_extra_info("socket")
            endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
        super().connection_made(transport)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, *why: Any, **named: Any
    ) -> web.StreamResponse:
        if status != HTTPStatus.BAD_REQUEST:
            return super().handle_error(request, status, *why, **named)
        # Its words may hold a key.
        self.strangers.warning("request_unreadable")
        reason = "this is not HTTP/1.1; check the request line and the headers"
        answer = problem_response(Refusal("malformed", reason))
        answer.force_close()
        return answer


class GatewayRunner(web.AppRunner):
    """aiohttp's, but its connections are ours."""

    @property
    def server(self) -> Any:
        """What makes connections; None before `setup`."""
        server = super().server
        return server and functools.partial(Connection, server, self.app[STRANGERS])


# Serving


def set_up_logging(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json=log_format == "json"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("aiohttp.server").addFilter(leave_out_the_request)


def leave_out_the_request(record: logging.LogRecord) -> bool:
    """aiohttp logs an unreadable body word for word, and a key may be among it."""
    if record.exc_info and isinstance(record.exc_info[1], UNREADABLE_BODY):
        record.msg, record.args, record.exc_info = "request_unreadable", (), None
        record.levelname = "WARNING"
    return True


async def listen(runner: web.AppRunner, host: str, port: int) -> None:
    # Every command in flight holds a connection.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror}; set PORT or HOST"
        raise CockpitError(reason) from error
    # What was loaded stays: looking for garbage in it only costs time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once.

    Returns the exit code.
    """
    app, serving = make_app(settings), asyncio.current_task()
    runner = GatewayRunner(app, shutdown_timeout=0.3)
    assert serving

    def on_signal() -> None:
        if serving.cancelling():
            os._exit(1)  # the database holds whatever was not finished
        serving.cancel()  # a start that waits for a cloud does not hold up the end

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopErrors())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await listen(runner, settings.gateway.host, settings.gateway.port)
        if settings.has_stand_in:
            app[GATEWAY].relay.start()
        print_banner(settings)
        await asyncio.Event().wait()  # for a signal
    except asyncio.CancelledError:
        if runner.sites:
            await drain(app[GATEWAY])
        else:
            log_event("stopped_while_starting")
    finally:
        await clean_up(runner)
    return 0


async def clean_up(runner: web.AppRunner) -> None:
    """A disk that hangs holds up no end: what is not on it was not acknowledged."""
    cleaning = asyncio.ensure_future(runner.cleanup())
    _, late = await asyncio.wait([cleaning], timeout=1)
    if late:  # what it would close next may hang as well
        log_warning("ended_with_the_disk_hanging")
        logging.shutdown()
        os._exit(0)
    await cleaning


class LoopErrors:
    """Logs what asyncio can tell nobody else; a lack of file descriptors once a minute."""

    told_at = NEVER

    def __call__(self, loop: asyncio.AbstractEventLoop, context: Json) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            log_error("loop_error", exc_info=error, error=context.get("message"))
        elif loop.time() - self.told_at >= 60:
            self.told_at = loop.time()
            remedy = "raise the limit (ulimit -n, or LimitNOFILE)"
            log_error("no_file_descriptors", error=error.strerror, remedy=remedy)


def print_banner(settings: Settings) -> None:
    gateway = settings.gateway
    mode = "production" if gateway.is_production else "local"
    log_event("serving", host=gateway.host, port=gateway.port, mode=mode)
    if settings.sleep_obstacle:
        log_warning("vms_stay_awake", reason=settings.sleep_obstacle)
    if settings.has_stand_in:
        key = LOCAL_KEY if LOCAL_KEY in gateway.api_keys else "the one in COCKPIT_API_KEY"
        url = f"http://127.0.0.1:{gateway.port}/"
        print(f"cockpit runs at {url} - the API key is: {key}", flush=True)
    agent = gateway.local_agent if settings.fly.is_local else ""
    if trouble := Agent(agent, LOCAL_FOLDER).trouble():
        print(f"LOCAL_AGENT: {trouble}", flush=True)
    if agent in PRESETS:
        who = pwd.getpwuid(os.geteuid()).pw_name
        where = Path(LOCAL_FOLDER, "vms").absolute()
        rights = f"with all that {who} may do on this machine"
        print(f"{agent} acts without asking, {rights}; it begins in {where}", flush=True)


# Doctor: a look returns a note, if any, and raises what is to be mended


async def look_at_folder(folder: Path) -> str:
    if folder.name == LOCAL_FOLDER.name and not await asyncio.to_thread(folder.exists):
        return f"{folder} is made by the first start"
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"cockpit")
    except OSError as error:
        reason = f"{folder} is not writable ({error.strerror})"
        raise CockpitError(f"{reason}; mount a volume there, or set ROUTES_FILE") from error
    return ""


async def look_at_routes(path: Path) -> str:
    return read_routes(path)[1]


async def look_at_token(fly: FlyClient, settings: FlySettings) -> str:
    if settings.is_local:
        return STAND_IN
    org, remedy = settings.org, "make one with: fly tokens create org"
    try:
        tokens = await fly.read_token()
        await fly.list_apps()
    except UpstreamRejected as error:
        reason = f"Fly refuses FLY_API_TOKEN for FLY_ORG {org} ({error.status})"
        raise CockpitError(f"{reason}; {remedy}") from error
    orgs = {str(token.get("org_slug") or org) for token in tokens}
    if orgs and org not in orgs and org != "personal":
        found = ", ".join(sorted(orgs))
        raise CockpitError(f"it is for {found}; set FLY_ORG to that, or {remedy}")
    return ""


async def look_at_account(twilio: TwilioClient, settings: TwilioSettings) -> str:
    if settings.is_local:
        return STAND_IN
    try:
        state = (await twilio.read_account()).get("status")
    except UpstreamRejected as error:
        if not settings.api_key:
            raise
        # A standard API key may not read the account itself.
        return f"not checked: TWILIO_API_KEY may not read it ({error.status})"
    if state != "active":
        raise CockpitError(f"it is {state}; see Twilio's console")
    return ""


async def look_at_number(twilio: TwilioClient, settings: Settings) -> str:
    if settings.twilio.is_local:
        return STAND_IN
    number = await twilio.find_number(settings.twilio.phone_number)
    if number is None:
        reason = "TWILIO_PHONE_NUMBER is not a number of this account"
        raise CockpitError(f"{reason}; mend it, or buy one")
    wanted = f"{settings.gateway.public_url}/sms"
    is_posted = number.get("sms_method", "POST") == "POST"
    has_application = number.get("sms_application_sid")
    # Behind a `#` stands how often Twilio tries.
    url = str(number.get("sms_url")).partition("#")[0]
    if url != wanted or not is_posted or has_application:
        remedy = f"set its messaging webhook to {wanted} with POST, no TwiML application"
        raise CockpitError(f"its texts go elsewhere; {remedy}")
    return ""


async def note(words: str) -> str:
    return words


async def examine(settings: Settings) -> int:
    """The command `doctor`: say `ok` or what to mend; returns the exit code.

    It takes no lock and changes nothing.
    """
    path, clock, code = state_path(settings), Clock(), 0
    async with contextlib.AsyncExitStack() as stack:
        fly, twilio = await open_clouds(stack, settings, clock, Metrics(clock))
        looks = {
            "settings": note(settings.sleep_obstacle),
            "state folder": look_at_folder(path.parent),
            "routes": look_at_routes(path),
            "Fly token": look_at_token(fly, settings.fly),
            "Twilio account": look_at_account(twilio, settings.twilio),
            "Twilio number": look_at_number(twilio, settings),
        }
        for subject, look in looks.items():
            try:
                words = await look
                verdict = "note" if words else "ok"
            except CockpitError as error:
                is_passing = isinstance(error, UpstreamUnavailable)
                remedy = "; check the network, then try again" if is_passing else ""
                verdict, words, code = "wrong", f"{error}{remedy}", 1
            print(f"{verdict:5} {subject}: {words}".removesuffix(": "), flush=True)
    return code


# Command line


def with_local_secret(environ: Mapping[str, str]) -> Mapping[str, str]:
    """In local mode one is made once and kept, so that local VMs know us again."""
    if environ.get("COCKPIT_ENV") == "production" or environ.get("COCKPIT_SECRET"):
        return environ
    path = LOCAL_FOLDER / "secret"
    try:
        secret = read_nofollow(path)
        if not re.fullmatch(rb"[!-~]{32,}\s*", secret):
            raise StoreError(f"{path} is not as it was made; {FORGET_IT}")
    except FileNotFoundError:
        secret = secrets.token_hex(32).encode()
        make_private_folder(LOCAL_FOLDER)
        write_atomically(path, [secret])
    return {**environ, "COCKPIT_SECRET": secret.decode()}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cockpit.py",
        description="Without a command it serves; without settings a whole local world.",
        epilog="The operator's page is http://127.0.0.1:8080/ (PORT). README.md lists "
        "the settings, which are environment variables.",
    )
    parser.add_argument("--version", action="version", version=f"cockpit {VERSION}")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("doctor", help="say what is wrong with settings, state, Fly and Twilio")
    vm = commands.add_parser("vm", help="serve what a VM speaks")
    words = "the text on its standard input, the answer on its standard output"
    for option, name, default, more in (
        ("--host", "HOST", "0.0.0.0", "where to listen"),
        ("--port", "PORT", "3000", ""),
        ("--agent", "LOCAL_AGENT", "", f"{', '.join(PRESETS)}, or a command: {words}"),
        ("--folder", "WORKSPACE", ".", "where it works"),
    ):
        value = os.environ.get(name) or default
        told = f"{more} ({name}; default: {'%(default)s' if value else 'one that echoes'})"
        vm.add_argument(option, default=value, help=told, type=int if name == "PORT" else str)
    vm.add_argument("--user", default="", help="as root: work as this user")
    vm.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    codes = "Exit code: 0 taken; 1 refused; 2 used wrongly; 3 no gateway; 4 limit reached."
    say = commands.add_parser("say", help="on a VM: text its owner", epilog=codes)
    say.add_argument("text")
    say.add_argument("images", nargs="*", type=Path, help="at most ten: PNG, JPEG, GIF")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run a command; exit code 2 for settings that are missing or wrong."""
    given = parse_arguments(argv)
    is_doctor = given.command == "doctor"
    try:
        if given.command == "vm":
            return run_vm(given)
        if given.command == "say":
            set_up_logging("text")
            return run_say(given)
        environ = os.environ if is_doctor else with_local_secret(os.environ)
        settings = Settings.from_env(environ)
        set_up_logging(settings.gateway.log_format)
        return asyncio.run(examine(settings) if is_doctor else serve(settings))
    except SettingsError as error:
        print(*(f"wrong {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 1 if is_doctor else 2
    except (CockpitError, OSError) as error:
        print(f"cockpit: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
