# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14,<4"]
# ///
"""cockpit: an engineer texts one phone number and drives the coding agent on a cloud VM of their own.

A text's journey: Twilio calls `POST /sms` -> its signature is checked -> the phone's route is found -> the text is
journaled (fsync) and only then answered 200 -> the phone's run lane posts it to the VM's `/command` -> the answer is
journaled -> the phone's send lane hands it to Twilio's REST API part by part. A route comes from `POST /provision`:
one Fly app per user, every step recorded before it is taken and undone if a later one fails.

Sections, each knowing only those above it: Settings - Vocabulary and errors - Metrics - Backoff - State on disk - Calls out -
Fly Machines - Twilio - The VM - Provisioning - Relay - Fleet - HTTP - Operator's page - Local mode - Assembly - Command line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import html
import ipaddress
import itertools
import json
import logging
import os
import queue
import random
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from json.encoder import encode_basestring_ascii as quote_json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote, quote_plus, unquote_plus, urlencode, urlsplit
from xml.sax.saxutils import escape

import aiohttp
from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict
from yarl import URL

T = TypeVar("T")
Json = dict[str, Any]
log = logging.getLogger("cockpit")

# --- Settings ---

PHONE = re.compile(r"\+[1-9][0-9]{6,14}")
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1", "[::1]"}


class CockpitError(Exception):
    """What this program raises on purpose; its text is one line for the operator, without secrets."""


class SettingsError(CockpitError):
    """Settings are missing or wrong; `problems` names each with its remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    if host in LOOPBACK_NAMES:
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def is_url(text: str, schemes: Sequence[str] = ("http", "https")) -> bool:
    """Whether it is a URL of a server, without user, query or fragment."""
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment or parts.username or re.search(r"[\s\\]", text))
    except ValueError:
        return False


class SettingsReader:
    """Reads environment variables and collects everything that is wrong with them, so that all is told at once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.problems: list[str] = []
        self.production = self.one_of("COCKPIT_ENV", "local", ("local", "production")) == "production"

    def wrong(self, name: str, remedy: str) -> None:
        self.problems.append(f"{name}: {remedy}")

    def text(self, name: str, default: str = "", *, required: bool = False) -> str:
        value = self.environ.get(name, "").strip()
        if not value and required and self.production:
            self.wrong(name, "is required when COCKPIT_ENV=production; set it")
        return value or default

    def matching(self, name: str, default: str, pattern: str, remedy: str, *, required: bool = False) -> str:
        value = self.text(name, default, required=required)
        if value and not re.fullmatch(pattern, value):
            self.wrong(name, remedy)
        return value

    def one_of(self, name: str, default: str, choices: Sequence[str]) -> str:
        return self.matching(name, default, "|".join(map(re.escape, choices)), f"must be {' or '.join(choices)}")

    def number(self, name: str, default: float, low: float, high: float = 1e9) -> float:
        raw = self.text(name, str(default))
        try:
            value = float(raw)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            self.wrong(name, f"must be a number from {low:g}" + (f" to {high:g}" if high < 1e9 else " up"))
            return default
        return value

    def whole(self, name: str, default: int, low: int, high: int = 10**9) -> int:
        value = self.number(name, default, low, high)
        if value != int(value):
            self.wrong(name, "must be a whole number")
        return int(value)

    def listed(self, name: str, default: str, pattern: str, remedy: str, *, required: bool = False) -> tuple[str, ...]:
        raw = self.text(name, default, required=required)
        values = tuple(part.strip() for part in raw.split(",") if part.strip())
        if raw and (not values or any(not re.fullmatch(pattern, value) for value in values)):
            self.wrong(name, remedy)
        return values

    def url(self, name: str, default: str, *, schemes: tuple[str, ...] = ("http", "https"), required: bool = False) -> str:
        value = self.text(name, default, required=required).rstrip("/")
        if not value or is_url(value, schemes):
            return value
        self.wrong(name, f"must be a URL starting with {' or '.join(s + '://' for s in schemes)}, without user, query or fragment")
        return default


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything the environment decides, read once; durations in seconds, memory in MB, disk in GB."""

    # This gateway.
    production: bool
    api_keys: tuple[str, ...] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    public_url: str
    host: str
    port: int
    routes_file: Path
    onboarding_url: str
    log_format: str
    metrics_token: str = field(repr=False)
    local_agent: str
    # Fly and the machines on it.
    fly_token: str = field(repr=False)
    fly_is_local: bool
    fly_url: str
    fly_org: str
    fly_network: str
    vm_image: str
    vm_app_prefix: str
    vm_regions: tuple[str, ...]
    vm_cpu_kind: str
    vm_cpus: int
    vm_memory_mb: int
    vm_volume_gb: int
    vm_is_public: bool
    vm_url: str
    # Twilio.
    twilio_is_local: bool
    twilio_account_sid: str
    twilio_auth_tokens: tuple[str, ...] = field(repr=False)
    twilio_phone_number: str
    twilio_api_key: str
    twilio_api_secret: str = field(repr=False)
    twilio_url: str
    # Limits and intervals.
    provision_timeout_s: float
    provision_limit: int
    vm_limit: int
    pool_size: int
    reconcile_s: float
    backfill_s: float
    vm_command_timeout_s: float
    vm_away_limit_s: float
    text_limit: int
    queue_limit: int
    drain_s: float

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from `environ`; raises SettingsError naming everything that is missing or wrong."""
        reader = SettingsReader(environ)
        gateway = read_gateway_settings(reader)
        values = gateway | read_fly_settings(reader, gateway) | read_vm_settings(reader)
        values |= read_twilio_settings(reader, gateway) | read_limits(reader)
        refuse_open_doors(reader, values)
        if reader.problems:
            raise SettingsError(reader.problems)
        return cls(**values)


def local_origin(gateway: Json) -> str:
    """Where this process reaches itself."""
    return f"http://[::1]:{gateway['port']}" if gateway["host"] in ("::1", "::") else f"http://127.0.0.1:{gateway['port']}"


def read_gateway_settings(read: SettingsReader) -> Json:
    printable = r"[\x21-\x2b\x2d-\x7e]"
    host = read.text("HOST", "0.0.0.0" if read.production else "127.0.0.1")
    port = read.whole("PORT", 8080, 1, 65535)
    api_keys = read.listed("COCKPIT_API_KEY", "local", "|".join([printable + "{16,}", *(() if read.production else ("local",))]),
                           "each key needs 16 or more printable characters without spaces; make one with: openssl rand -hex 32", required=True)
    roots = read.listed("COCKPIT_SECRET", "" if read.production else secrets.token_hex(32), printable + "{32,}",
                        "each secret needs 32 or more printable characters without spaces; make one with: openssl rand -hex 32", required=True)
    schemes = ("https",) if read.production else ("http", "https")
    origin = local_origin({"host": host, "port": port})
    return {
        "production": read.production, "host": host, "port": port, "api_keys": api_keys, "secrets": roots,
        "public_url": read.url("PUBLIC_URL", "" if read.production else origin, schemes=schemes, required=True),
        "routes_file": Path(read.text("ROUTES_FILE", "routes.json")),
        "onboarding_url": read.url("ONBOARDING_URL", ""),
        "log_format": read.one_of("LOG_FORMAT", "json" if read.production else "text", ("text", "json")),
        "metrics_token": read.text("METRICS_TOKEN"),
        "local_agent": read.text("LOCAL_AGENT"),
    }


def read_fly_settings(read: SettingsReader, gateway: Json) -> Json:
    token = read.matching("FLY_API_TOKEN", "", r"[\x20-\x7e]+", "must be one line of printable characters; make one with: fly tokens create org", required=True)
    is_local = not token and not read.production
    default_vm_url = "http://{app}.flycast:3000"
    if read.text("VM_NETWORK", "private") == "public":
        default_vm_url = "https://{app}.fly.dev"
    if is_local:
        default_vm_url = local_origin(gateway) + "/_local/vm/{app}"
    return {
        "fly_token": token or secrets.token_hex(16), "fly_is_local": is_local,
        "fly_url": local_origin(gateway) + "/_local/fly" if is_local else read.url("FLY_API_HOSTNAME", "https://api.machines.dev"),
        "fly_org": read.matching("FLY_ORG", "personal", r"[A-Za-z0-9-]+", "must be an organisation's slug; see: fly orgs list"),
        "fly_network": read.matching("FLY_NETWORK", "", r"[A-Za-z][A-Za-z0-9-]*", "must be a Fly network's name: letters, digits and dashes, a letter first"),
        "vm_url": read_vm_url(read, default_vm_url),
    }


def read_vm_url(read: SettingsReader, default: str) -> str:
    template = read.text("VM_URL", default).rstrip("/")
    try:
        is_valid = is_url(template.format(app="a", machine_id="b", region="c"))
    except (KeyError, IndexError, ValueError, AttributeError):
        is_valid = False
    if not is_valid:
        read.wrong("VM_URL", "must be an http or https URL in which only {app}, {machine_id} and {region} are filled in")
    return template


def read_vm_settings(read: SettingsReader) -> Json:
    kind = read.one_of("VM_CPU_KIND", "shared", ("shared", "performance"))
    cpus, memory = read.whole("VM_CPUS", 1, 1, 64), read.whole("VM_MEMORY_MB", 2048, 256, 10**7)
    # Fly's own limits for a guest (flyctl, internal/machine/update.go).
    sizes, step, least, most = ((1, 2, 4, 6, 8), 256, 256, 2048) if kind == "shared" else ((1, *range(2, 65, 2)), 1024, 2048, 8192)
    if cpus not in sizes:
        read.wrong("VM_CPUS", f"with VM_CPU_KIND={kind} must be one of {', '.join(map(str, sizes))}")
    elif memory % step or not least * cpus <= memory <= most * cpus:
        read.wrong("VM_MEMORY_MB", f"with {cpus} {kind} CPU(s) must be a multiple of {step} from {least * cpus} to {most * cpus}")
    return {
        "vm_cpu_kind": kind, "vm_cpus": cpus, "vm_memory_mb": memory,
        "vm_image": read.matching("VM_IMAGE", "registry.fly.io/sms-cockpit-vm:latest", r"[^\s\x00-\x1f]+", "must be an image reference"),
        # A vm_id is the prefix, a dash and 8 characters; Fly's app names stay under 63.
        "vm_app_prefix": read.matching("VM_APP_PREFIX", "cockpit-vm", r"[a-z][a-z0-9-]{0,52}", "must start with a letter and hold a-z, 0-9 and dashes, 53 at most"),
        "vm_regions": read.listed("VM_REGION", "iad", r"[a-z]{2,5}", "must be Fly region codes separated by commas, such as iad,ewr", required=False),
        "vm_volume_gb": read.whole("VM_VOLUME_GB", 0, 0, 500),
        "vm_is_public": read.one_of("VM_NETWORK", "private", ("private", "public")) == "public",
    }


def read_twilio_settings(read: SettingsReader, gateway: Json) -> Json:
    names = ("TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "TWILIO_PHONE_NUMBER")
    given = [name for name in names if read.text(name)]
    is_local = not given and not read.production
    if given and not read.production:
        for name in sorted(set(names) - set(given)):
            read.wrong(name, f"is required together with {' and '.join(given)}; set it, or none of them for the stand-in")
    key, secret = read.text("TWILIO_API_KEY"), read.text("TWILIO_API_SECRET")
    if bool(key) != bool(secret):
        read.wrong("TWILIO_API_SECRET" if key else "TWILIO_API_KEY", "TWILIO_API_KEY and TWILIO_API_SECRET go together; set both or neither")
    tokens = read.listed("TWILIO_AUTH_TOKEN", "", r"[\x21-\x7e]+", "must be the account's auth token, or two separated by a comma while rotating", required=True)
    if len(tokens) > 2:
        read.wrong("TWILIO_AUTH_TOKEN", "at most two, separated by a comma, while rotating")
    return {
        "twilio_is_local": is_local, "twilio_api_key": key, "twilio_api_secret": secret,
        "twilio_auth_tokens": tokens or (secrets.token_hex(16),),
        "twilio_account_sid": read.matching("TWILIO_ACCOUNT_SID", "", r"AC[0-9A-Za-z]+", "must be the account SID, which starts with AC", required=True)
        or "AC" + secrets.token_hex(16),
        "twilio_phone_number": read.matching("TWILIO_PHONE_NUMBER", "", PHONE.pattern, "must be in E.164 form, such as +15551234567", required=True) or "+15550000000",
        "twilio_url": local_origin(gateway) + "/_local/twilio" if is_local else read.url("TWILIO_API_URL", "https://api.twilio.com"),
    }


def read_limits(read: SettingsReader) -> Json:
    return {
        "provision_timeout_s": read.number("PROVISION_TIMEOUT_S", 300, 0.1), "provision_limit": read.whole("PROVISION_LIMIT", 20, 1),
        "vm_limit": read.whole("VM_LIMIT", 0, 0), "pool_size": read.whole("POOL_SIZE", 0, 0, 1000),
        "reconcile_s": read.number("RECONCILE_S", 60, 0), "backfill_s": read.number("BACKFILL_S", 60, 0),
        "vm_command_timeout_s": read.number("VM_COMMAND_TIMEOUT_S", 330, 0.01), "vm_away_limit_s": read.number("VM_AWAY_LIMIT_S", 600, 0.01),
        "text_limit": read.whole("TEXT_LIMIT", 30, 0), "queue_limit": read.whole("QUEUE_LIMIT", 20, 1),
        "drain_s": read.number("DRAIN_S", 4, 0),
    }


def refuse_open_doors(read: SettingsReader, values: Json) -> None:
    """Local mode hands out a shell, so none of its conveniences may face more than this machine."""
    if read.production:
        return
    public_host = urlsplit(values["public_url"]).hostname or ""
    if not is_loopback(public_host) or not is_loopback(values["host"]):
        if "local" in values["api_keys"]:
            read.wrong("COCKPIT_API_KEY", "the key 'local' is refused when PUBLIC_URL or HOST reaches beyond this machine; set a key of 16 characters or more")
        if values["twilio_is_local"]:
            read.wrong("TWILIO_ACCOUNT_SID", "the stand-in for Twilio is refused when PUBLIC_URL or HOST reaches beyond this machine; "
                       "set TWILIO_ACCOUNT_SID, TWILIO_AUTH_TOKEN and TWILIO_PHONE_NUMBER")
    if not values["fly_is_local"] and is_loopback(public_host):
        read.wrong("PUBLIC_URL", "a Fly token needs a PUBLIC_URL that Fly's VMs can reach; set it, or unset FLY_API_TOKEN for the stand-in")


# --- Vocabulary and errors ---
#
# CockpitError
#   SettingsError                    settings are missing or wrong: printed, exit 2
#   StoreError                       the state on disk cannot be read or written: 503 storage
#   Refusal(code)                    what an HTTP caller is told; STATUS_OF gives its status
#   UpstreamError                    Fly or Twilio; knows service, operation, status, request id
#     UpstreamUnavailable            refused, reset, timeout, 429, 5xx: the only class worth another attempt
#     UpstreamRejected               any other 4xx
#       UpstreamNotFound             404
#     UpstreamUnreadable             2xx with a body we cannot read: it took effect
#   VmAway, VmBusy, VmSilent, VmFailed, VmUnreadable       how a hand-over to a VM can end (section The VM)

STATUS_OF = {
    "malformed": 400, "unauthorized": 401, "bad_signature": 403, "vm_limit": 403, "forbidden": 403, "unknown_vm": 404, "not_found": 404,
    "method_not_allowed": 405, "phone_taken": 409, "torn_down": 409, "wrong_state": 409, "gone": 410, "too_large": 413,
    "unsupported_media_type": 415, "invalid_request": 422, "too_many": 429, "fly_rejected": 502, "internal": 500,
    "fly_unavailable": 503, "no_capacity": 503, "storage": 503, "draining": 503, "vm_unhealthy": 504, "vm_unreachable": 504,
}


class StoreError(CockpitError):
    """The state on disk cannot be read or written."""


class Refusal(CockpitError):
    """What an HTTP caller is told: a stable code, a detail in words, and further members of the problem document."""

    def __init__(self, code: str, detail: str, *, retry_after_s: int = 0, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.code, self.detail, self.members = code, detail, members
        self.status = STATUS_OF[code]
        self.headers = dict(headers or {})
        if retry_after_s or self.status in (429, 503):
            self.headers["Retry-After"] = str(retry_after_s or 5)


class UpstreamError(CockpitError):
    """A call to Fly or Twilio failed; `status` is 0 when no answer came."""

    def __init__(self, service: str, operation: str, *, status: int = 0, request_id: str = "", words: str = "",
                 code: str = "", maybe_done: bool = False, retry_after_s: float | None = None) -> None:
        self.service, self.operation, self.status, self.request_id = service, operation, status, request_id
        self.words, self.code, self.maybe_done, self.retry_after_s = scrub(words), code, maybe_done, retry_after_s
        told = f"{service} {operation}: " + (f"{status} {self.words}".strip() if status else self.words)
        super().__init__(told + (f" (request id {request_id})" if request_id else ""))


class UpstreamUnavailable(UpstreamError):
    """Worth another attempt, if what it may have done can be repeated (`maybe_done`)."""


class UpstreamRejected(UpstreamError):
    """A 4xx: asking again changes nothing."""


class UpstreamNotFound(UpstreamRejected):
    """404: there is no such thing, or not yet, or no longer."""


class UpstreamUnreadable(UpstreamError):
    """A 2xx whose body makes no sense: the call took effect, but what came of it must be looked up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """The sources of time and chance, handed to whoever needs them; seconds throughout."""

    now: Callable[[], float] = time.time  # wall clock: across restarts
    monotonic: Callable[[], float] = time.monotonic  # durations inside this process
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    uniform: Callable[[float, float], float] = random.uniform
    random_bytes: Callable[[int], bytes] = secrets.token_bytes

    def random_id(self) -> str:
        """Eight random base32 characters, lower case."""
        return base64.b32encode(self.random_bytes(5)).decode().lower()


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
    key_id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: Json) -> Route:
        """Raises ValueError naming the field that is not what it should be."""
        known = {name: stored[name] for name in ROUTE_FIELDS if name in stored}
        for name, value in known.items():
            if not isinstance(value, str):
                raise ValueError(f"{name} is not a text")
        for name in SHARED_FIELDS & known.keys():  # one copy for 100,000 routes
            known[name] = sys.intern(known[name])
        if not known.get("vm_id"):
            raise ValueError("vm_id is missing")
        extra = {name: value for name, value in stored.items() if name not in ROUTE_FIELDS}
        return cls(**known, extra=extra)

    def to_json(self) -> Json:
        values = {name: getattr(self, name) for name in ROUTE_FIELDS}
        return {name: value for name, value in values.items() if value or name in ("vm_id", "machine_id", "vm_url", "state")} | dict(self.extra)


SHARED_FIELDS = frozenset(("region", "image", "state", "key_id"))
ROUTE_FIELDS = tuple(f.name for f in dataclasses.fields(Route) if f.name != "extra")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A Fly machine, as much of it as is acted on."""

    id: str
    state: str
    region: str
    app: str = ""  # told by lists only
    instance_id: str = ""
    created_at: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # empty when Fly knows it only in part
    metadata: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    build: str = ""  # the image by its digest
    last_event: str = ""
    checks_pass: bool = False
    host_ok: bool = True


class InboundMessage(NamedTuple):
    """A text as Twilio delivers it; `arrived` is wall-clock seconds."""

    sid: str
    sender: str
    recipient: str
    body: str
    arrived: float
    media: tuple[tuple[str, str], ...] = ()  # (url, content type)
    opt_out: str = ""
    fetched: bool = False  # from Twilio's list, not by webhook


class Answer(NamedTuple):
    """What a VM said to a command, as far as it could be understood."""

    text: str
    exit_code: int = 0
    images: tuple[str, ...] = ()
    unreadable: bool = False


def mask_phone(phone: str) -> str:
    """`+15551234567` as `+1555***4567`; shorter numbers show less."""
    digits = phone.removeprefix("whatsapp:")
    return f"{digits[:min(5, max(2, len(digits) - 7))]}***{digits[-4:]}"


def scrub(text: str, hide: Iterable[str] = ()) -> str:
    """Words from outside, made fit for a log line or an error: no whole phone number, none of `hide`, one line, 500 characters."""
    for secret in sorted(hide, key=len, reverse=True):  # one may hold another
        for form in (secret, json.dumps(secret)[1:-1]) if len(secret) >= 4 else ():
            text = text.replace(form, "[hidden]")
    text = re.sub(r"(?:\+|%2B)[1-9][0-9]{6,14}", lambda m: mask_phone(m.group().replace("%2B", "+")), text)
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", text).strip()[:500]


def normalise_phone(text: str) -> str:
    """A phone number in E.164 form, spaces, dots, dashes and parentheses removed; raises ValueError."""
    phone = re.sub(r"[ .()-]", "", text)
    if not PHONE.fullmatch(phone):
        raise ValueError("must be a phone number in E.164 form: +, then 7 to 15 digits, the first not 0, such as +15551234567")
    return phone


def timestamp(wall_s: float) -> str:
    """RFC 3339 in UTC, whole seconds."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_timestamp(told: object) -> float | None:
    """Wall-clock seconds of an RFC 3339 time, or None."""
    try:
        return datetime.fromisoformat(str(told).replace("Z", "+00:00")).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        return None


def rfc3339(wall_s: float) -> str:
    """The same to the millisecond."""
    return datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def keyed_mark(secret: str, what: str) -> str:
    """base64url HMAC-SHA256 of `what`, without padding."""
    return base64.urlsafe_b64encode(hmac.digest(secret.encode(), what.encode("utf-8", "surrogateescape"), "sha256")).decode().rstrip("=")


def fingerprint(secret: str) -> str:
    """A short name for one of COCKPIT_SECRET's secrets, from which it cannot be found."""
    return hashlib.sha256(b"cockpit key " + secret.encode()).hexdigest()[:8]


def secret_of(key_id: str, roots: Sequence[str]) -> str:
    """The secret a route's VM was given, or the signing one when that is no longer configured."""
    return next((root for root in roots if fingerprint(root) == key_id), roots[0])


def vm_token(secret: str, vm_id: str) -> str:
    """The bearer token a VM and the gateway share: derived, stored nowhere."""
    return f"{vm_id}.{keyed_mark(secret, 'vm:' + vm_id)}"


def owner_mark(secret: str, vm_id: str, phone: str) -> str:
    """The stamp by which a machine proves whose it is (a VM can write its own metadata)."""
    return keyed_mark(secret, f"owner:{vm_id}:{phone}")


def sign_link(secret: str, vm_id: str, what: str, until: float) -> str:
    """The last part of a `/media` address: what of which VM, until when, and a mark; no phone number is in it."""
    told = base64.urlsafe_b64encode(f"{vm_id} {int(until)} {what}".encode()).decode().rstrip("=")
    return f"{told}.{keyed_mark(secret, 'media:' + told)}"


def read_link(signed: str, roots: Sequence[str], now: float) -> tuple[str, str]:
    """Whose VM a link is about, and what of it; raises Refusal when we did not make it or its time is over."""
    told, _, mark = signed.partition(".")
    given = mark.encode("utf-8", "surrogateescape")
    if not any([hmac.compare_digest(keyed_mark(root, f"media:{told}").encode(), given) for root in roots]):
        raise Refusal("forbidden", "this link was not made here, or was changed on its way; use it as it was sent")
    vm_id, until, what = base64.urlsafe_b64decode(told + "=" * (-len(told) % 4)).decode().split(" ", 2)
    if int(until) <= now:
        raise Refusal("gone", "this link is over a day old; ask for the image again")
    return vm_id, what


REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
WHOLE_PHONE = re.compile(r"\+[1-9][0-9]{6,14}")


def log_event(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """One log line: a stable event name and its fields; phone numbers go in masked."""
    told = {name: value for name, value in fields.items() if value not in ("", None)}
    log_lines(event, tuple(told), [tuple(told.values())], level)


def log_lines(event: str, names: tuple[str, ...], rows: Iterable[tuple[object, ...]], level: int = logging.INFO) -> None:
    """Lines of one event with the same fields, written together."""
    if log.isEnabledFor(level):
        # Made by hand: finding the caller's file and line, which nobody reads here, costs more than the rest.
        record = logging.LogRecord(log.name, level, "", 0, event, None, None)
        record.names, record.rows = names, rows
        log.handle(record)


class LineFormatter(logging.Formatter):
    """Writes a record as `key=value` text or as JSON, with the request it belongs to, and hides whole phone numbers whatever wrote them."""

    encode = json.JSONEncoder(default=str).encode

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        names, rows = getattr(record, "names", ()), getattr(record, "rows", [()])
        head = [("at", rfc3339(record.created)), ("level", record.levelname.lower()), ("event", record.getMessage())]
        if (request_id := REQUEST_ID.get()) and "request_id" not in names:
            head.append(("request_id", request_id))
        if record.exc_info:
            head.append(("trace", self.formatException(record.exc_info)))
        lines = self._as_json(dict(head), names, rows) if self.as_json else self._as_text(head, names, rows)
        text = "\n".join(lines)
        return WHOLE_PHONE.sub(lambda found: mask_phone(found.group()), text) if "+" in text else text

    def _as_json(self, head: Mapping[str, str], names: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
        # One template for all rows: half the cost of an encoded object each.
        line = self.encode(head)[:-1].replace("%", "%%") + "".join(f', "{name}": %s' for name in names) + "}"
        return [line % tuple([quote_json(value) if type(value) is str else value if type(value) is int else self.encode(value) for value in row]) for row in rows]

    @staticmethod
    def _as_text(head: Sequence[tuple[str, str]], names: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
        start = " ".join([head[0][1][11:], head[1][1], head[2][1], *(f"{name}={shlex.quote(value)}" for name, value in head[3:])])
        return [" ".join([start, *(f"{name}={shlex.quote(json.dumps(value) if isinstance(value, dict) else str(value))}" for name, value in zip(names, row, strict=True))]) for row in rows]


# --- Metrics ---

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})
STATUS_CLASSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx", "6xx", "7xx", "8xx", "9xx")
MOST_SERIES = 200  # of one metric: whatever comes, what is above it counts as `other`


def series(name: str, labels: Sequence[str], values: Sequence[str], number: float) -> str:
    """One line of Prometheus text."""
    told = ",".join(f'{label}="{value}"' for label, value in zip(labels, (v.translate(LABEL_ESCAPES) for v in values), strict=True))
    return f"{name}{{{told}}} {number:.12g}" if told else f"{name} {number:.12g}"


class Counts:
    """A counter per combination of label values, which come from small fixed sets: never a number or an id."""

    def __init__(self, meaning: str, *labels: str) -> None:
        self.meaning, self.labels = meaning, labels
        self.values: dict[tuple[str, ...], int] = {} if labels else {(): 0}

    def add(self, *values: str, by: int = 1) -> None:
        if values not in self.values and len(self.values) >= MOST_SERIES:
            values = ("other",) * len(values)
        self.values[values] = self.values.get(values, 0) + by

    def expose(self, name: str) -> Iterator[str]:
        yield f"# HELP {name}_total {self.meaning}\n# TYPE {name}_total counter"
        for values, number in sorted(self.values.items()):
            yield series(f"{name}_total", self.labels, values, number)


class Durations:
    """A histogram of seconds per combination of label values."""

    def __init__(self, meaning: str, *labels: str) -> None:
        self.meaning, self.labels = meaning, labels
        self.cells: dict[tuple[str, ...], list[float]] = {} if labels else {(): [0] * (len(BUCKETS_S) + 2)}

    def observe(self, seconds: float, *values: str) -> None:
        cells = self.cells.get(values)
        if cells is None:
            cells = self.cells[values] = [0] * (len(BUCKETS_S) + 2)
        cells[bisect_left(BUCKETS_S, seconds)] += 1
        cells[-1] += seconds

    def expose(self, name: str) -> Iterator[str]:
        yield f"# HELP {name}_seconds {self.meaning}\n# TYPE {name}_seconds histogram"
        for values, cells in sorted(self.cells.items()):
            total = 0.0
            for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), cells, strict=False):
                total += count
                yield series(f"{name}_seconds_bucket", (*self.labels, "le"), (*values, bound), total)
            yield series(f"{name}_seconds_sum", self.labels, values, cells[-1])
            yield series(f"{name}_seconds_count", self.labels, values, total)


class Metrics:
    """What is counted and timed. An attribute's name is its metric's, between `cockpit_` and `_total` or `_seconds`."""

    def __init__(self, clock: Clock) -> None:
        self.texts = Counts("Texts that came in, by what the door said.", "outcome")
        self.texts_finished = Counts("Texts accepted earlier that came to an end, by which.", "outcome")
        self.messages_sent = Counts("Parts of messages handed to Twilio, by outcome.", "outcome")
        self.unasked = Counts("Messages that VMs texted their owners unasked.")
        self.deliveries = Counts("What Twilio told of messages sent, by status.", "status")
        self.outages = Counts("Times a VM was found away.")
        self.text_handover = Durations("From a text's webhook to its first hand-over to the VM.")
        self.text_answer = Durations("From a text's webhook to its answer's last part being taken by Twilio.")
        self.provision = Durations("Provisionings, by what came of them.", "outcome")
        self.pool_claims = Counts("Sign-ups that wanted a machine of the pool: claimed, missed, or claimed and then refused by Fly.", "outcome")
        self.provision_step = Durations("Steps of provisionings that succeeded.", "step")
        self.journal_sync = Durations("One fsync of the journal.")
        self.journal_lines = Counts("Lines queued for the journal.")
        self.upstream = Durations("Calls to Fly and Twilio, by class of status; none: no answer came.", "service", "operation", "status")
        self.twilio_errors = Counts("Errors that Twilio told, by its code.", "code")
        self.refusals = Counts("Requests that were refused, by call and code.", "call", "code")
        self._clock = clock
        self._minutes: dict[int, list[int]] = {}
        self.recent_answers: deque[float] = deque(maxlen=1000)

    def note_text(self, *, failed: bool = False) -> None:
        """Count a text accepted, or one that failed, into the present minute."""
        minute = int(self._clock.monotonic() // 60)
        cell = self._minutes.get(minute)
        if cell is None:
            cell = self._minutes[minute] = [0, 0]
            for old in [known for known in self._minutes if known <= minute - 61]:
                del self._minutes[old]
        cell[failed] += 1

    def last_hour(self) -> list[list[int]]:
        """Texts and failures of each of the last 60 minutes, the present one last."""
        minute = int(self._clock.monotonic() // 60)
        return [self._minutes.get(at, [0, 0]) for at in range(minute - 59, minute + 1)]

    def texts_a_minute(self) -> float:
        """Texts of the last 60 s, the minute before the present one counting for what is left of it."""
        gone = self._clock.monotonic() % 60 / 60
        before, present = self.last_hour()[-2:]
        return present[0] + before[0] * (1 - gone)

    def quantile(self, share: float) -> float | None:
        """Seconds from text to answer within which this share of the last 1,000 stayed."""
        known = sorted(self.recent_answers)
        return known[min(len(known) - 1, int(share * len(known)))] if known else None

    def expose(self, gauges: Iterable[tuple[str, str, str, Mapping[str, float]]]) -> str:
        """Everything in Prometheus's text format; a gauge is its name, meaning, label (or nothing) and values."""
        lines = [line for name, metric in vars(self).items() if isinstance(metric, Counts | Durations) for line in metric.expose(f"cockpit_{name}")]
        for name, meaning, label, values in gauges:
            lines.append(f"# HELP cockpit_{name} {meaning}\n# TYPE cockpit_{name} gauge")
            lines += [series(f"cockpit_{name}", (label,) if label else (), (value,) if label else (), number) for value, number in values.items()]
        return "\n".join(lines) + "\n"


# --- Backoff ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often and how long to try again, seconds throughout; the pause before retry n is uniform(0, min(cap, base * 2**(n-1)))."""

    attempts: int = 5
    base_s: float = 0.5
    cap_s: float = 8.0
    budget_s: float = 60.0

    def ceiling(self, failures: int) -> float:
        """The longest pause after this many failures (1 or more)."""
        return float(min(self.cap_s, self.base_s * 2.0 ** min(failures - 1, 30)))


async def retry(call: Callable[[], Awaitable[T]], policy: Retry, clock: Clock,
                on: tuple[type[UpstreamError], ...] = (UpstreamUnavailable,)) -> T:
    """Await `call()` until it succeeds, fails for good, or policy's attempts or budget end; the last error is raised unchanged.

    A 429 was never processed, so it is bounded by the budget alone; `Retry-After` is obeyed as the least pause.
    """
    failures, throttled, began = 0, 0, clock.monotonic()
    while True:
        try:
            return await call()
        except on as error:
            throttled += error.status == 429
            failures += error.status != 429
            pause = clock.uniform(0, policy.ceiling(failures + throttled))
            pause = max(pause, error.retry_after_s or 0)
            if failures >= policy.attempts or clock.monotonic() + pause - began > policy.budget_s:
                raise
            log_event("retry", level=logging.WARNING, error=str(error), attempt=failures + throttled + 1, pause_s=round(pause, 2))
            await clock.sleep(pause)


@contextlib.asynccontextmanager
async def time_limit(clock: Clock, seconds: float) -> AsyncIterator[None]:
    """Like asyncio.timeout, by the given clock: raises TimeoutError when the block takes longer."""
    async with asyncio.timeout(None) as limit:
        async def expire() -> None:
            await clock.sleep(seconds)
            limit.reschedule(asyncio.get_running_loop().time())

        watchdog = asyncio.create_task(expire())
        try:
            yield
        finally:
            watchdog.cancel()


class Owner:
    """Owns background tasks: none is lost, each failure is logged, all end together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name=name or None)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, Refusal):
            log.error("task_failed", exc_info=error, extra={"names": ("task",), "rows": [(getattr(task.get_coro(), "__qualname__", ""),)]})

    async def close(self) -> None:
        """Cancel what still runs and wait for its end."""
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)  # from Python 3.12 on nobody waits for the callbacks of tasks that have ended


class TimeLimit:
    """What runs under it (`with`) for longer than `seconds` by the given clock ends with TimeoutError.

    One sleeper, which ends with `owner`, watches all of them: a timer for each of aiohttp's calls is a twentieth of all work per text.
    """

    def __init__(self, seconds: float, clock: Clock, owner: Owner) -> None:
        self._seconds, self._clock, self._owner = seconds, clock, owner
        # Of tasks: when they are late, and how often they were cancelled before. All have the same time, so the first to begin is the first to be late.
        self._running: dict[Any, tuple[float, int]] = {}
        self._late: dict[Any, int] = {}
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        task: Any = asyncio.current_task()
        assert task not in self._running, "a time limit holds for one call of a task at a time"
        self._running[task] = self._clock.monotonic() + self._seconds, task.cancelling()
        if self._watcher is None or self._watcher.done():
            self._watcher = self._owner.start(self._watch())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        task: Any = asyncio.current_task()
        self._running.pop(task, None)
        if (cancelled_before := self._late.pop(task, None)) is not None and task.uncancel() <= cancelled_before and kind is asyncio.CancelledError:
            raise TimeoutError from error

    async def _watch(self) -> None:
        while self._running:
            task, (deadline, cancelled_before) = next(iter(self._running.items()))
            if (left := deadline - self._clock.monotonic()) > 0:
                await self._clock.sleep(left)
            else:
                del self._running[task]
                self._late[task] = cancelled_before
                task.cancel()


# --- State on disk ---

def tight_encoder() -> Callable[[Any], str]:
    """json.dumps without blanks; where CPython's encoder is to be had it is made once, not at each of a text's calls (a third less each)."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return json.JSONEncoder(separators=(",", ":")).encode
    encode = make(None, None, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True)
    return lambda value: "".join(encode(value, 0))


dump = json.JSONEncoder(separators=(", ", ": ")).encode
dump_tight = tight_encoder()


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_to_owner(handle: int, folder: Path) -> None:
    """A file that root makes, as `restore` over ssh does, belongs to the folder's owner: the gateway must be able to read it."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(handle, owner.st_uid, owner.st_gid)


def write_atomically(path: Path, chunks: Iterable[bytes]) -> int:
    """Replace `path` with `chunks`, all or nothing, mode 0600, and return its size; raises StoreError.

    Blocks for two fsyncs: call it in a thread.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            give_to_owner(file.fileno(), path.parent)
            file.writelines(chunks)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
        return size
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(f"{path.name} cannot be written: {error.strerror}") from error


class StateLock:
    """One process per state file: held until closed or until the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".lock")
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            give_to_owner(self._handle, path.parent)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be opened: {error.strerror}; check that the folder exists and is writable") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            raise StoreError(f"another cockpit is using {path}; stop it first, or set ROUTES_FILE to another file") from error

    def close(self) -> None:
        os.close(self._handle)


@dataclass(slots=True, kw_only=True)
class StoredState:
    """routes.json, read and checked."""

    gateway_id: str = ""
    routes: dict[str, Route] = field(default_factory=dict)
    undo: dict[str, Json] = field(default_factory=dict)
    pool: dict[str, Json] = field(default_factory=dict)
    extra: Json = field(default_factory=dict)
    lines: dict[str, bytes] = field(default_factory=dict)  # the routes' own, when they stand as this program writes them

    @classmethod
    def parse(cls, text: bytes) -> StoredState:
        """Raises ValueError saying what is wrong with the file."""
        stored, lines = read_by_line(text) or (json.loads(text), {})
        if not isinstance(stored, dict):
            raise ValueError("it does not hold a JSON object")
        check_version(stored.pop("version", None))
        sections = {name: stored.pop(name, {}) for name in ("routes", "undo", "pool")}
        for name, section in sections.items():
            if not isinstance(section, dict) or not all(isinstance(entry, dict | Route) for entry in section.values()):
                raise ValueError(f'its "{name}" is not an object of objects')
        gateway_id = stored.pop("gateway_id", "")
        if not isinstance(gateway_id, str):
            raise ValueError('its "gateway_id" is not a text')
        routes: dict[str, Route] = {}
        for phone, entry in sections["routes"].items():
            if not PHONE.fullmatch(phone):
                raise ValueError(f"a route's key is not a phone number: {mask_phone(phone)}")
            try:
                routes[phone] = entry if isinstance(entry, Route) else Route.from_json(entry)
            except ValueError as error:
                raise ValueError(f"the route of {mask_phone(phone)} is unusable: {error}") from error
        vm_ids = {route.vm_id for route in routes.values()}
        if len(vm_ids) != len(routes):
            raise ValueError("one vm_id stands under two numbers")
        check_pool(sections["pool"], vm_ids)
        return cls(gateway_id=gateway_id, routes=routes, undo=sections["undo"], pool=sections["pool"], extra=stored, lines=lines)


def check_pool(pool: Mapping[str, Json], routed: set[str]) -> None:
    """An entry is claimed or destroyed by what it says, so it must be read as one; raises ValueError."""
    for vm_id, entry in pool.items():
        try:
            named = Route.from_json(entry).vm_id
        except ValueError as error:
            raise ValueError(f"the pool's {vm_id} is unusable: {error}") from error
        if named != vm_id or vm_id in routed:
            raise ValueError(f"the pool's {vm_id} has another vm_id, or stands under a number too")


def check_version(version: object) -> None:
    """Raises ValueError when there is none, StoreError when a newer cockpit wrote the file: no old copy may then take its place."""
    if type(version) is not int or version < 1:
        raise ValueError('it has no "version"')
    if version > 1:
        raise StoreError(f'the routes are of "version" {version}, which a newer cockpit wrote: run that one (nothing was overwritten)')


ROUTES_BEGIN, ROUTES_END = b'"routes": {\n', b"\n}"


def read_by_line(text: bytes) -> tuple[Any, dict[str, bytes]] | None:
    """A file as this program writes it, its routes parsed line by line and their lines kept; None for any other.

    100,000 routes take two thirds of the time and memory that one json.loads and writing the lines anew would.
    """
    begin = text.find(ROUTES_BEGIN) + len(ROUTES_BEGIN)
    end = text.find(ROUTES_END, begin)
    if begin < len(ROUTES_BEGIN) or end < 0:
        return None
    routes: dict[str, Any] = {}
    lines: dict[str, bytes] = {}
    try:
        stored = json.loads(text[:begin] + text[end:])
        for line in text[begin:end].split(b",\n"):
            (phone, entry), = json.loads(b"{%b}" % line).items()
            routes[phone], lines[phone] = Route.from_json(entry), line
        if stored["routes"]:  # the section found was another's
            return None
        stored["routes"] = routes
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return stored, lines


def read_state(path: Path) -> tuple[StoredState, str]:
    """routes.json, or its last good copy and a note saying so; raises StoreError when neither can be read."""
    reasons = []
    for candidate in (path, path.with_name(path.name + ".bak")):
        try:
            state = StoredState.parse(candidate.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            reasons.append(f"{candidate} cannot be used: {getattr(error, 'strerror', None) or error}")
        else:
            note = "" if candidate == path else f"{reasons[0] if reasons else f'{path} is missing'}; the last good copy {candidate.name} was used"
            return state, note
    if reasons:
        raise StoreError("; ".join(reasons) + "; mend it or put back a good copy (nothing was overwritten)")
    return StoredState(), ""


class RouteStore:
    """The routes and what is being undone, in memory and in routes.json.

    Changes take effect in memory at once; `commit` waits until they are on disk. Changes that come together share one write.
    """

    def __init__(self, path: Path, clock: Clock, owner: Owner) -> None:
        """Reads the file (blocking); raises StoreError. The caller holds the file's lock."""
        self.path, self._clock, self._owner = path, clock, owner
        state, self.recovered = read_state(path)
        self.is_new = not state.gateway_id
        self.gateway_id = state.gateway_id or clock.random_id()
        self.routes, self.undo, self.pool, self._extra = state.routes, state.undo, state.pool, state.extra
        self.states = Counter(route.state for route in self.routes.values())
        self._lines = state.lines or {phone: self._line(phone, route) for phone, route in self.routes.items()}
        self._phone_of = {route.vm_id: phone for phone, route in self.routes.items()}
        self._phone_of_machine = {route.machine_id: phone for phone, route in self.routes.items() if route.machine_id}
        self._vm_ids = sorted(self._phone_of)
        self._waiters: list[asyncio.Future[None]] = []
        self._writer: asyncio.Task[None] | None = None
        self.trouble = ""

    @staticmethod
    def _line(phone: str, route: Route) -> bytes:
        return f"{dump(phone)}: {dump(route.to_json())}".encode()

    def put(self, phone: str, route: Route) -> None:
        """Set a phone's route; call `commit` to have it on disk."""
        self.drop(phone)
        self.routes[phone] = route
        self.states[route.state] += 1
        self._lines[phone] = self._line(phone, route)
        self._phone_of[route.vm_id] = phone
        insort(self._vm_ids, route.vm_id)
        if route.machine_id:
            self._phone_of_machine[route.machine_id] = phone

    def drop(self, phone: str) -> None:
        """Forget a phone's route, if there is one."""
        route = self.routes.pop(phone, None)
        if route is None:
            return
        self.states[route.state] -= 1
        del self._lines[phone], self._phone_of[route.vm_id]
        self._phone_of_machine.pop(route.machine_id, None)
        place = bisect_right(self._vm_ids, route.vm_id) - 1
        del self._vm_ids[place]

    def adopt(self, gateway_id: str, routes: Mapping[str, Route]) -> None:
        """Go on as this gateway, with these routes and no others."""
        self.gateway_id = gateway_id
        for phone in list(self.routes):
            self.drop(phone)
        for phone, route in routes.items():
            if route.vm_id not in self.undo:
                self.put(phone, route)

    def begin_undo(self, phone: str, reason: str) -> None:
        """Move a route to the undo section, which frees its number in the same write."""
        route = self.routes[phone]
        self.drop(phone)
        self.undo[route.vm_id] = route.to_json() | {"phone_number": phone, "reason": reason}

    def find(self, vm_id: str) -> tuple[str, Route] | None:
        """The phone and route of a vm_id or machine id."""
        phone = self._phone_of.get(vm_id) or self._phone_of_machine.get(vm_id)
        return (phone, self.routes[phone]) if phone else None

    def page(self, after: str, limit: int) -> list[str]:
        """Up to `limit` vm_ids behind `after`, in order."""
        start = bisect_right(self._vm_ids, after)
        return self._vm_ids[start:start + limit]

    async def commit(self) -> None:
        """Wait until every change made so far is on disk; raises StoreError (the write goes on being tried)."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if self._writer is None:
            self._writer = self._owner.start(self._write_while_needed(), "write routes")
        await waiter

    async def _write_while_needed(self) -> None:
        failures = 0
        try:
            while self._waiters or failures:
                waiters, self._waiters = self._waiters, []
                lines, rest = list(self._lines.values()), self._rest()
                try:
                    await asyncio.to_thread(write_atomically, self.path, self._chunks(lines, rest))
                except StoreError as error:
                    failures += 1
                    self.trouble = str(error)
                    log_event("routes_not_written", level=logging.ERROR, error=str(error))
                    settle(waiters, error)
                    await self._clock.sleep(min(5.0, 0.5 * failures))
                    continue
                failures, self.trouble = 0, ""
                settle(waiters, None)
                # The copy comes after the waiters are let go: it only guards against later damage to the file itself.
                with contextlib.suppress(StoreError):
                    await asyncio.to_thread(write_atomically, self.path.with_name(self.path.name + ".bak"), self._chunks(lines, rest))
        finally:
            self._writer = None
            settle(self._waiters, StoreError(f"{self.path.name} was not written: shutting down"))

    def _rest(self) -> tuple[bytes, bytes]:
        head = {"version": 1, "gateway_id": self.gateway_id, **self._extra}
        return dump(head)[:-1].encode() + b', "routes": {\n', b'\n}, "undo": ' + dump(self.undo).encode() + b', "pool": ' + dump(self.pool).encode() + b"}\n"

    @staticmethod
    def _chunks(lines: list[bytes], rest: tuple[bytes, bytes]) -> Iterable[bytes]:
        yield rest[0]
        # A thousand lines at a time, so that no join of 100,000 holds up the event loop's thread.
        for start in range(0, len(lines), 1000):
            yield (b",\n" if start else b"") + b",\n".join(lines[start:start + 1000])
        yield rest[1]

    async def close(self) -> None:
        """Write what is unwritten, if the disk lets us."""
        if self._writer is not None:
            with contextlib.suppress(StoreError, TimeoutError):
                async with asyncio.timeout(2):
                    await self.commit()
                    if self._writer is not None:
                        await asyncio.shield(self._writer)


def settle(waiters: Iterable[asyncio.Future[None]], error: Exception | None) -> None:
    """Let go everybody who waits, with success or the error; who was cancelled meanwhile is passed over."""
    for waiter in waiters:
        if not waiter.done():
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A journal's new content, queued like any line so that it falls at the right place."""

    chunks: Iterable[bytes]


class Journal:
    """An append-only file of JSON lines; many lines share one fsync, made in a thread of its own.

    `snapshot` gives the records that the present state is made of (a long one as pieces of its line), `is_idle` whether nothing is in flight: the file is
    rewritten from them when it is idle and has grown by 64 KiB, when it is above 8 MiB, and after a failed write.
    """

    GROWTH = 64 * 1024
    CEILING = 8 * 1024 * 1024
    GATHER_S = 0.001

    def __init__(self, path: Path, clock: Clock, owner: Owner, metrics: Metrics) -> None:
        self.path, self._clock, self._owner, self._metrics = path, clock, owner, metrics
        self.snapshot: Callable[[], Iterable[Json | Iterable[bytes]]] = tuple
        self.is_idle: Callable[[], bool] = lambda: False
        self.trouble = ""
        self._queue: queue.SimpleQueue[tuple[bytes | Rewrite, asyncio.Future[None] | None] | None] = queue.SimpleQueue()
        self.queued = 0  # lines, so far
        self._unresolved: deque[bytes] = deque()  # queued, not known to be on disk: part of any rewrite
        self._rewriting = False
        self._repairing = False
        self._damage: StoreError | None = None  # the writing thread's: lines are missing on file, only a rewrite mends that
        self._thread: threading.Thread | None = None
        self._handle = -1
        self.size = self.base_size = 0

    def read(self) -> list[Json]:
        """The records on file (blocking); a torn last line is cut off, other unreadable lines are skipped and said."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            raw = b""
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error.strerror}") from error
        whole = raw[:raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            log_event("journal_torn", level=logging.WARNING, bytes_cut=len(raw) - len(whole))
            os.truncate(self.path, len(whole))
        records, bad = [], 0
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                bad += 1
        if bad:
            log_event("journal_lines_unreadable", level=logging.ERROR, lines=bad)
        self.size = len(whole)  # how much of it is past is not known: `base_size` stays 0
        return records

    def open(self) -> None:
        """Start the writing thread (blocking); raises StoreError."""
        self._open_file()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def _open_file(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        try:
            self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self.size = os.fstat(self._handle).st_size
        except OSError as error:
            raise StoreError(f"{self.path} cannot be opened: {error.strerror}") from error

    @property
    def is_writing(self) -> bool:
        """Whether anything queued is not yet known to be on disk."""
        return bool(self._unresolved) or self._rewriting

    def append(self, record: Json) -> asyncio.Future[None]:
        """Queue one record; the future ends when it is on disk, or with StoreError."""
        if self.trouble and not self._rewriting:
            self._rewrite().add_done_callback(lambda done: done.exception())
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._put(record, waiter)
        return waiter

    def note(self, record: Json) -> None:
        """Queue one record that nobody waits for."""
        self._put(record, None)

    def _put(self, record: Json, waiter: asyncio.Future[None] | None) -> None:
        line = dump_tight(record).encode() + b"\n"
        self.queued += 1
        self._unresolved.append(line)
        self._queue.put((line, waiter))

    def _rewrite(self) -> asyncio.Future[None]:
        self._rewriting = True
        parts: list[Iterable[bytes]] = [(dump_tight(part).encode() + b"\n",) if isinstance(part, dict) else part for part in self.snapshot()]
        chunks = itertools.chain.from_iterable([*parts, tuple(self._unresolved)])
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((Rewrite(chunks), waiter))
        return waiter

    def _work(self) -> None:
        """The writing thread: takes what has gathered, writes it, syncs once, tells the event loop."""
        gathered = 0
        while True:
            item = self._queue.get()
            if gathered > 2:
                # Under load a short pause lets more lines share the fsync. Relays per second by milliseconds: 0.3: 3,384, 0.6: 3,529, 1: 3,562, 1.4: 3,498, 2: 3,365.
                time.sleep(self.GATHER_S)
            batch = [item]
            with contextlib.suppress(queue.Empty):
                while item is not None and not isinstance(item[0], Rewrite):
                    batch.append(item := self._queue.get_nowait())
            rewrite = batch.pop() if item is None or isinstance(item[0], Rewrite) else None
            lines = [entry for entry in batch if entry is not None]
            gathered = len(lines)
            if lines:
                waiters = [waiter for _, waiter in lines if waiter]
                self._report(len(lines), waiters, self._write(b"".join(line for line, _ in lines if isinstance(line, bytes)), sync=bool(waiters)))
            if rewrite is not None and isinstance(rewrite[0], Rewrite):
                self._report(0, [rewrite[1]] if rewrite[1] else [], self._replace(rewrite[0].chunks), rewrote=True)
            if item is None:
                return

    def _report(self, lines: int, waiters: list[asyncio.Future[None]], error: StoreError | None, *, rewrote: bool = False) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody is left to tell
            self._loop.call_soon_threadsafe(self._resolve, lines, waiters, error, rewrote)

    def _write(self, data: bytes, *, sync: bool) -> StoreError | None:
        if self._damage is not None:
            return self._damage
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._handle, view):]
            if sync:
                began = self._clock.monotonic()
                os.fdatasync(self._handle)
                self._metrics.journal_sync.observe(self._clock.monotonic() - began)
            self.size += len(data)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self.size)  # no half line may stay before the next one
            self._damage = StoreError(f"{self.path.name} cannot be written: {error.strerror}")
        return self._damage

    def _replace(self, chunks: Iterable[bytes]) -> StoreError | None:
        try:
            try:
                self.base_size = write_atomically(self.path, chunks)
            finally:
                self._open_file()  # even what failed may have replaced the file: lines go to the one that has the name now
        except StoreError as error:
            return error
        self._damage = None
        return None

    def _resolve(self, lines: int, waiters: list[asyncio.Future[None]], error: StoreError | None, rewrote: bool) -> None:
        self._metrics.journal_lines.add(by=lines)
        if rewrote:
            self._rewriting = False
        settle(waiters, error)
        # Behind those who were just let go: until they have acted on it, only the line itself tells a rewrite of it.
        self._loop.call_soon(self._forget, lines)
        if error is not None:
            if not self.trouble:
                log_event("journal_not_written", level=logging.ERROR, error=str(error))
            self.trouble = str(error)
            if not self._repairing:
                self._repairing = True
                self._owner.start(self._repair(), "repair journal")
        elif rewrote:
            self.trouble = ""

    def _forget(self, lines: int) -> None:
        for _ in range(lines):
            self._unresolved.popleft()
        self.tidy()

    def tidy(self) -> None:
        """Rewrite the file if it has grown enough: called after each write and when nothing is in flight any more."""
        if self._rewriting or self._repairing or self.trouble:
            return
        grown = self.size - self.base_size
        # Half the base besides: a large remembered state is not written again for every 64 KiB.
        if (grown >= max(self.GROWTH, self.base_size // 2) and self.is_idle()) or (self.size > self.CEILING and grown > self.CEILING // 2):
            self._rewrite().add_done_callback(lambda done: done.exception())  # a failure is told by _resolve

    async def _repair(self) -> None:
        """After a failed write the file may lack lines that memory already counts on: write it anew until that succeeds."""
        while True:
            await self._clock.sleep(1.0)
            with contextlib.suppress(StoreError):
                await self._rewrite()
            if not self.trouble:
                log_event("journal_recovered", level=logging.WARNING)
                self._repairing = False
                return

    async def close(self) -> None:
        """Write what is queued; leave a file without finished business behind; end the thread."""
        if self._thread is None:
            return
        with contextlib.suppress(StoreError):
            if self.size > self.base_size or self.trouble:
                await self._rewrite()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        os.close(self._handle)


# --- Calls out ---

MAX_UPSTREAM_BYTES = 8 * 1024 * 1024
# What aiohttp's response is made of in the one version line whose requests are known here; with any other aiohttp makes its requests itself.
KNOWN_RESPONSE = {"method", "url", "writer", "continue100", "timer", "request_info", "traces", "loop", "session", "stream_writer", "return"}
PREPARES_REQUESTS = aiohttp.__version__.startswith("3.14.") and aiohttp.ClientResponse.__init__.__annotations__.keys() == KNOWN_RESPONSE


class Burst:
    """Sends what is to go out in one turn of the event loop together at its end: one by one, each would wake its receiver (a sixth of a text's work)."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[asyncio.WriteTransport, bytes]] = deque()

    def add(self, transport: asyncio.WriteTransport, raw: bytes) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting.append((transport, raw))

    def _send(self) -> None:
        try:
            while self._waiting:
                transport, raw = self._waiting.popleft()
                transport.write(raw)  # nothing, if it was closed meanwhile
        finally:
            if self._waiting:  # one failed: that is not the others' fault
                asyncio.get_running_loop().call_soon(self._send)


class Packet(NamedTuple):
    """A whole request in bytes, and what sends it."""

    raw: bytes
    burst: Burst
    output_size: int = 0  # aiohttp's response asks its writer for it


class PreparedRequest(aiohttp.ClientRequest):
    """A request of which a Packet goes out as it is: aiohttp need not merge, look through and write headers, nor start a task for the body.

    With `Burst` it spares a fifth of all work per text. `request_class` of ClientSession; what has no Packet is aiohttp's own business.
    """

    proxy = proxy_auth = proxy_headers = server_hostname = None
    packet: Packet | None = None

    def __init__(self, method: str, url: URL, *, data: Any = None, **given: Any) -> None:
        if not isinstance(data, Packet):
            super().__init__(method, url, data=data, **given)
            return
        self.packet, self.method, self.url, self.original_url, self.headers = data, method, url, url, given["headers"]
        self.loop, self.response_class = given["loop"], given["response_class"]
        self._session, self._timer, self._ssl, self._traces = given["session"], given["timer"], given["ssl"], given["traces"]

    async def send(self, conn: Any) -> aiohttp.ClientResponse:
        if self.packet is None:
            return await super().send(conn)
        protocol = conn.protocol
        if protocol.transport is None or protocol.transport.is_closing():
            raise aiohttp.ClientConnectionResetError("the connection is closing")
        self.packet.burst.add(protocol.transport, self.packet.raw)
        protocol.start_timeout()
        packet: Any = self.packet
        return self.response_class(self.method, self.url, writer=None, continue100=None, timer=self._timer, request_info=self.request_info, traces=self._traces,
                                   loop=self.loop, session=self._session, stream_writer=packet)


class Call:
    """A POST that is made again and again: what is the same each time is put into bytes once. For sessions whose requests are PreparedRequests."""

    def __init__(self, url: URL, headers: Mapping[str, str], burst: Burst) -> None:
        self._url, self._burst = url, burst
        self._headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": aiohttp.http.SERVER_SOFTWARE, **headers}
        self._head = f"POST {url.raw_path_qs} HTTP/1.1\r\nHost: {url.host_port_subcomponent}\r\n" + header_lines(self._headers) if PREPARES_REQUESTS else ""

    async def post(self, session: aiohttp.ClientSession, body: bytes, timeouts: aiohttp.ClientTimeout, more: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The answer, as far as its head; `more` are further headers. Raises aiohttp.ClientError, TimeoutError, or ValueError for what no header can hold."""
        head = f"{self._head}{header_lines(more)}Content-Length: {len(body)}\r\n\r\n"
        if not PREPARES_REQUESTS:
            return await session.post(self._url, data=aiohttp.BytesPayload(body), headers={**self._headers, **more}, allow_redirects=False, timeout=timeouts)
        return await session.post(self._url, data=Packet(head.encode() + body, self._burst), allow_redirects=False, timeout=timeouts)


def header_lines(headers: Mapping[str, str]) -> str:
    """Headers as they go on the wire; raises ValueError when one would break out of its line."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
        raise ValueError("a control character in a header")
    return lines


async def read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """The body, or None when it is longer than `limit` bytes; afterwards the response is done with."""
    if response.content.is_eof():  # it came together with its head, as small ones do
        raw = response.content.read_nowait()
        return raw if len(raw) <= limit else None
    chunks, size = [], 0
    async with response:
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > limit:
                response.close()
                return None
            chunks.append(chunk)
    return b"".join(chunks)


def kind_of_failure(status: int) -> type[UpstreamError]:
    """The error class of an HTTP status of 300 and above; 408 is Fly's wait running out, or its host's."""
    if status in (408, 429) or status >= 500:
        return UpstreamUnavailable
    return UpstreamNotFound if status == HTTPStatus.NOT_FOUND else UpstreamRejected


def read_retry_after(headers: Mapping[str, str], clock: Clock) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date; at most a minute is obeyed."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        pause = float(value)
    except ValueError:
        try:
            pause = parsedate_to_datetime(value).timestamp() - clock.now()
        except (ValueError, OverflowError):
            return None
    return min(60.0, max(0.0, pause)) if pause == pause else None


# --- Fly Machines ---

# Calls whose 401 or 403 means that Fly refuses our token; elsewhere it may be an app not visible yet, or somebody else's.
TOKEN_CALLS = {"create app", "delete app", "list apps", "list org machines", "read token"}
FRESH_APPS = 200  # apps whose affinity cookies are kept
FRESH_APP_S = 60.0  # how long an app may stay invisible after its creation (fly-go, WaitForApp)
SEEN_APP_S = 5.0  # how long one that was seen before is looked for
CAPACITY_WORDS = ("insufficient resources", "insufficient memory", "no capacity", "over the allowed quota")


def fly_authorization(token: str) -> str:
    """The Authorization header for a Fly token: `FlyV1` for macaroons, whole comma-joined, else `Bearer` (fly-go, tokens/tokens.go)."""
    token = token.strip()
    while token.lower().startswith(("bearer ", "flyv1 ")):
        token = token.split(" ", 1)[1].strip()
    parts = [part.strip() for part in token.split(",") if part.strip()]
    macaroons = [part for part in parts if part.split("_", 1)[0] in ("fm1r", "fm1a", "fm2")]
    return "FlyV1 " + ",".join(macaroons) if macaroons else "Bearer " + ",".join(parts)


def is_capacity(error: UpstreamError) -> bool:
    """Whether Fly is out of room there: it comes as 400, 403, 409, 412, 422 and 5xx, so only its words tell."""
    return error.code == "insufficient_capacity" or any(words in error.words.lower() for words in CAPACITY_WORDS)


def parse_machine(stored: Any) -> Machine:
    """Raises ValueError when it is not a machine."""
    if not isinstance(stored, dict) or not isinstance(stored.get("id"), str) or not stored["id"] or not isinstance(stored.get("state"), str):
        raise ValueError("a machine without id or state")
    config, reference = stored.get("config") or {}, stored.get("image_ref") or {}
    metadata = (config or stored.get("incomplete_config") or {}).get("metadata") or {}
    checks = [check for check in stored.get("checks") or [] if isinstance(check, dict)]
    named = "/".join(str(reference[part]) for part in ("registry", "repository") if reference.get(part))
    return Machine(
        id=stored["id"], state=stored["state"], region=str(stored.get("region") or ""), app=str(stored.get("app_name") or ""), config=config,
        instance_id=str(stored.get("instance_id") or ""), created_at=read_timestamp(stored.get("created_at")),
        metadata={str(name): str(value) for name, value in metadata.items()}, image=str(config.get("image") or ""),
        build=f"{named}@{reference['digest']}" if named and reference.get("digest") else "", last_event=next((str(event["id"]) for event in stored.get("events") or []), ""),
        checks_pass=bool(checks) and all(check.get("status") == "passing" for check in checks),
        host_ok=stored.get("host_status", "ok") == "ok",
    )


class FlyClient:
    """The Machines API, one method per verb; every request goes through `_request`.

    Facts: Fly's OpenAPI document and docs; rate limits are 1 request/s with bursts of 3 per action and app or machine
    (5/s, bursts of 10, for Get Machine), so requests are paced here rather than refused there.
    """

    def __init__(self, session: aiohttp.ClientSession, settings: Settings, clock: Clock, metrics: Metrics) -> None:
        self._session, self._settings, self._clock, self._metrics = session, settings, clock, metrics
        self._base = settings.fly_url + "/v1"
        self._headers = {"Authorization": fly_authorization(settings.fly_token)}
        self._tokens = re.split("[ ,]", self._headers["Authorization"])[1:]
        self._ready_at: dict[tuple[str, str], float] = {}
        self.retry = Retry(attempts=5, base_s=0.5, cap_s=8, budget_s=settings.provision_timeout_s)
        self.trouble = ""
        self._refusal_logged_at = float("-inf")
        self._fresh: deque[str] = deque()

    async def _pace(self, action: str, identifier: str) -> None:
        rate, burst = (5.0, 10) if action == "get machine" else (1.0, 3)
        now, key = self._clock.monotonic(), (action, identifier)
        if len(self._ready_at) > 10_000:
            self._ready_at = {known: at for known, at in self._ready_at.items() if at > now}
        at = max(self._ready_at.get(key, 0.0), now)
        self._ready_at[key] = at + 1 / rate
        # The margin covers a clock that runs a little apart from Fly's.
        if (pause := at - now - (burst - 1) / rate) > 0:
            await self._clock.sleep(pause + 0.02)

    async def _request(self, method: str, path: str, action: str, identifier: str = "", *, body: Json | None = None,
                       query: Mapping[str, str] | None = None, timeout_s: float = 30, hide: Iterable[str] = ()) -> Any:
        """One request; raises UpstreamError's children, which carry status, request id and Fly's words with `hide` left out."""
        await self._pace(action, identifier)
        url = URL(self._base + path, encoded=True)
        if query:
            url = url.with_query(query)

        def fault(kind: type[UpstreamError], words: str, **facts: Any) -> UpstreamError:
            return kind("fly", action, words=scrub(words, (*self._tokens, *hide)), **facts)

        status, began = 0, self._clock.monotonic()
        try:
            async with self._session.request(method, url, json=body, headers=self._headers, allow_redirects=False,
                                             timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=10)) as response:
                status = response.status
                raw = await read_at_most(response, MAX_UPSTREAM_BYTES)
        except aiohttp.ClientConnectorError as error:
            raise fault(UpstreamUnavailable, f"not reached ({type(error).__name__})") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise fault(UpstreamUnavailable, f"no answer ({type(error).__name__})", maybe_done=True) from error
        finally:
            self._metrics.upstream.observe(self._clock.monotonic() - began, "fly", action, STATUS_CLASSES[status // 100])
        request_id = response.headers.get("fly-request-id", "")
        if response.status >= 300:
            words, code = explain_fly(raw or b"")
            kind = kind_of_failure(response.status)
            self._notice_refusal(action, response.status, words)
            raise fault(kind, words, status=response.status, request_id=request_id, code=code, maybe_done=response.status != 429,
                        retry_after_s=read_retry_after(response.headers, self._clock))
        self.trouble = ""
        if not raw:
            return None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise fault(UpstreamUnreadable, "an answer that is not JSON", status=response.status, request_id=request_id, maybe_done=True) from error

    def _notice_refusal(self, action: str, status: int, words: str) -> None:
        """A token that Fly refuses is told on /health, and in one log line a minute."""
        if action not in TOKEN_CALLS or status not in (401, 403) or any(full in words.lower() for full in CAPACITY_WORDS):
            return
        self.trouble = f"Fly refuses our token ({status} to {action}): set FLY_API_TOKEN to an organisation token of {self._settings.fly_org}"
        if (now := self._clock.monotonic()) - self._refusal_logged_at >= 60:
            self._refusal_logged_at = now
            log_event("fly_refuses_us", level=logging.ERROR, error=self.trouble)

    def _nonsense(self, action: str, words: str) -> UpstreamUnreadable:
        return UpstreamUnreadable("fly", action, words=words, maybe_done=True)

    async def _repeatably(self, call: Callable[[], Awaitable[T]]) -> T:
        """For calls that may be made twice: GETs, idempotent writes."""
        return await retry(call, self.retry, self._clock, on=(UpstreamUnavailable, UpstreamUnreadable))

    async def _surely_not_done(self, call: Callable[[], Awaitable[T]]) -> T:
        """For calls that must not be made twice: tried again only when the last one had no effect."""
        async def once() -> T:
            try:
                return await call()
            except UpstreamUnavailable as error:
                if error.maybe_done:
                    raise Ambiguous(error) from error
                raise
        try:
            return await retry(once, self.retry, self._clock)
        except Ambiguous as ambiguous:
            raise ambiguous.error from ambiguous.error.__cause__

    # Apps

    async def create_app(self, app: str) -> None:
        """Create the app on a network named after it; an app of that name that is ours counts as created. Raises NameTaken."""
        body = {"name": app, "org_slug": self._settings.fly_org, "network": app}

        async def create() -> None:
            try:
                # `wait` is what Fly's own client sends; a repeated create answers 422 name_taken.
                await self._request("POST", "/apps", "create app", body=body, query={"wait": "true"}, timeout_s=60)
            except UpstreamUnreadable:
                return
            except UpstreamRejected as error:
                taken = error.code == "name_taken" or "already been taken" in error.words.lower() or error.status == 409
                if not taken or not await self._is_ours(app, error):
                    raise
                log_event("app_adopted", vm_id=app)
        self._fresh.append(app)
        if len(self._fresh) > FRESH_APPS:  # cookies of apps long made would only pile up
            self._forget_cookies(self._fresh.popleft())
        await self._repeatably(create)

    async def _is_ours(self, app: str, taken: UpstreamRejected) -> bool:
        deadline = self._clock.monotonic() + (FRESH_APP_S if taken.code == "name_taken" else 0)
        while True:
            try:
                found = await self._repeatably(lambda: self.get_app(app))
                break
            except UpstreamNotFound:
                if self._clock.monotonic() >= deadline:
                    return False
            except UpstreamRejected as error:
                raise NameTaken("fly", "create app", status=taken.status, request_id=taken.request_id, words=f"the name {app} is taken by somebody else") from error
            await self._clock.sleep(1.0)  # made a moment ago by a call whose answer was lost, and not visible yet
        organization = found.get("organization")
        slug = organization.get("slug") if isinstance(organization, dict) else None
        return slug in (None, self._settings.fly_org) and found.get("network", app) == app

    async def list_apps(self) -> set[str]:
        """The names of the organisation's apps."""
        async def list_all() -> set[str]:
            listed = await self._request("GET", "/apps", "list apps", query={"org_slug": self._settings.fly_org})
            apps = listed.get("apps") if isinstance(listed, dict) else None
            if not isinstance(apps, list) or not all(isinstance(app, dict) and isinstance(app.get("name"), str) for app in apps):
                raise self._nonsense("list apps", "an answer without apps")
            return {app["name"] for app in apps}
        return await self._repeatably(list_all)

    async def get_app(self, app: str) -> Json:
        """One attempt; raises UpstreamNotFound when there is none."""
        found = await self._request("GET", f"/apps/{quote(app)}", "get app", app)
        if not isinstance(found, dict) or found.get("name", app) != app:
            raise self._nonsense("get app", "an answer that is not this app")
        return found

    async def delete_app(self, app: str) -> bool:
        """Ask for the app and everything in it to be deleted; False when Fly knows no such app (any more, or yet)."""
        async def delete() -> bool:
            try:
                await self._request("DELETE", f"/apps/{quote(app)}", "delete app", app, query={"force": "true"}, timeout_s=60)
            except UpstreamNotFound:
                return False
            except UpstreamUnreadable:
                return True
            return True
        return await self._repeatably(delete)

    def _forget_cookies(self, app: str) -> None:
        self._session.cookie_jar.clear(lambda cookie: cookie["path"].rstrip("/").endswith(f"/apps/{app}"))

    # Secrets, addresses, volumes

    async def set_secrets(self, app: str, values: Mapping[str, str]) -> int:
        """Set all secrets in one call and return their version."""
        async def set_all() -> int:
            answer = await self._request("POST", f"/apps/{quote(app)}/secrets", "set secrets", app, body={"values": dict(values)}, hide=values.values())
            version = (answer.get("version") or answer.get("Version")) if isinstance(answer, dict) else None
            if not isinstance(version, int):
                raise self._nonsense("set secrets", "an answer without a version")
            return version
        return await self._repeatably(set_all)

    async def ensure_address(self, app: str, kind: str, network: str = "") -> None:
        """Allocate an address of this kind (`private_v6`, `shared_v4`, `v6`); the outcome being unknown, what is there is listed first."""
        path, body = f"/apps/{quote(app)}/ip_assignments", {"type": kind} | ({"network": network} if network else {})

        async def is_there() -> bool:
            listed = await self._request("GET", path, "list addresses", app)
            if not isinstance(listed, dict) or not isinstance(listed.get("ips"), list):
                raise self._nonsense("list addresses", "an answer without ips")
            return any(kind_of_address(address) == kind for address in listed["ips"] if isinstance(address, dict))

        async def allocate() -> bool:
            await self._request("POST", path, "allocate address", app, body=body, timeout_s=60)
            return True
        await self._once(allocate, lambda: self._repeatably(is_there))

    async def ensure_volume(self, app: str, region: str, guest: Json) -> tuple[str, str]:
        """Create the volume a machine's /data lives on; returns its id and its region."""
        path = f"/apps/{quote(app)}/volumes"
        body = {"name": "data", "region": region, "size_gb": self._settings.vm_volume_gb, "compute": guest}

        async def find() -> tuple[str, str] | None:
            listed = await self._request("GET", path, "list volumes", app)
            if not isinstance(listed, list):
                raise self._nonsense("list volumes", "an answer that is not a list")
            return next(((str(v["id"]), region) for v in listed if isinstance(v, dict) and v.get("id") and v.get("name") == "data"
                         and v.get("region") == region and "destroy" not in str(v.get("state"))), None)

        async def create() -> tuple[str, str] | None:
            volume = await self._request("POST", path, "create volume", app, body=body, timeout_s=60)
            if not isinstance(volume, dict) or not isinstance(volume.get("id"), str):
                raise self._nonsense("create volume", "an answer without an id")
            return volume["id"], str(volume.get("region") or region)
        made = await self._once(create, lambda: self._repeatably(find))
        assert made is not None
        return made

    async def delete_volume(self, app: str, volume_id: str) -> None:
        """Delete a volume; none being there is success."""
        async def delete() -> None:
            with contextlib.suppress(UpstreamNotFound, UpstreamUnreadable):
                await self._request("DELETE", f"/apps/{quote(app)}/volumes/{quote(volume_id)}", "delete volume", app)
        await self._repeatably(delete)

    async def _once(self, create: Callable[[], Awaitable[T]], find: Callable[[], Awaitable[T]]) -> T:
        """Make something that has no idempotency key exactly once: after an unknown outcome look for it, twice, before making it again."""
        for attempt in range(1, self.retry.attempts + 1):
            try:
                return await self._surely_not_done(create)
            except (UpstreamUnavailable, UpstreamUnreadable) as error:
                if is_capacity(error) or not error.maybe_done:
                    raise
                for pause in (0.2, 1.0):  # lists lag behind writes
                    await self._clock.sleep(pause)
                    if found := await find():
                        return found
                if attempt == self.retry.attempts:
                    raise
                await self._clock.sleep(self._clock.uniform(0, self.retry.ceiling(attempt)))
        raise AssertionError("unreachable")

    # Machines

    async def create_machine(self, app: str, request: Json, launch: str) -> Machine:
        """Create a machine; one that carries our `cockpit_launch` mark after an unknown outcome is adopted."""
        path = f"/apps/{quote(app)}/machines"

        async def create() -> Machine | None:
            return self._machine("create machine", await self._request("POST", path, "create machine", app, body=request, timeout_s=90))

        async def find() -> Machine | None:
            machines = await self.list_machines(app)
            return next((machine for machine in machines if machine.metadata.get("cockpit_launch") == launch), None)
        machine = await self._once(create, find)
        assert machine is not None
        return machine

    def _machine(self, action: str, answer: Any) -> Machine:
        try:
            return parse_machine(answer)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise self._nonsense(action, str(error)) from error

    async def list_machines(self, app: str) -> list[Machine]:
        async def list_all() -> list[Machine]:
            listed = await self._request("GET", f"/apps/{quote(app)}/machines", "list machines", app)
            if not isinstance(listed, list):
                raise self._nonsense("list machines", "an answer that is not a list")
            return [self._machine("list machines", entry) for entry in listed]
        return await self._repeatably(list_all)

    async def list_org_machines(self) -> tuple[list[Machine], list[str]]:
        """The organisation's machines (without host status), and the regions that Fly could not ask."""
        machines: list[Machine] = []
        unasked: set[str] = set()
        cursors = [""]

        async def list_page() -> Json:
            query = {"limit": "1000"} | ({"cursor": cursors[-1]} if cursors[-1] else {})
            page = await self._request("GET", f"/orgs/{quote(self._settings.fly_org)}/machines", "list org machines", query=query, timeout_s=60)
            if not isinstance(page, dict) or not isinstance(page.get("machines"), list):
                raise self._nonsense("list org machines", "an answer without machines")
            return page
        while True:
            page = await self._repeatably(list_page)
            machines += [self._machine("list org machines", entry) for entry in page["machines"]]
            unasked.update(str(region) for region in page.get("error_regions") or ())
            following = str(page.get("next_cursor") or "")  # pages may be short, or even empty, while more follow
            if not following:
                return machines, sorted(unasked)
            if following in cursors:
                raise self._nonsense("list org machines", "a list that goes round in circles")
            cursors.append(following)

    async def get_machine(self, app: str, machine_id: str) -> Machine:
        async def get() -> Machine:
            return self._machine("get machine", await self._request("GET", f"/apps/{quote(app)}/machines/{quote(machine_id)}", "get machine", machine_id))
        return await self._repeatably(get)

    async def start_machine(self, app: str, machine_id: str) -> None:
        """One attempt: the state is read again before another."""
        await self._request("POST", f"/apps/{quote(app)}/machines/{quote(machine_id)}/start", "start machine", machine_id)

    async def delete_machine(self, app: str, machine_id: str) -> None:
        """Destroy one machine of an app; none being there is success."""
        async def delete() -> None:
            with contextlib.suppress(UpstreamNotFound, UpstreamUnreadable):
                await self._request("DELETE", f"/apps/{quote(app)}/machines/{quote(machine_id)}", "delete machine", machine_id, query={"force": "true"})
        await self._repeatably(delete)

    async def restart_machine(self, app: str, machine: Machine) -> None:
        """Restart a machine, or start it when it rests."""
        if machine.state in ("stopped", "suspended"):
            return await self.start_machine(app, machine.id)
        path = f"/apps/{quote(app)}/machines/{quote(machine.id)}/restart"
        return await self._surely_not_done(lambda: self._request("POST", path, "restart machine", machine.id, query={"timeout": "30s"}, timeout_s=90))

    async def update_machine(self, app: str, machine: Machine, config: Json, secrets_version: int) -> Machine:
        """Replace the machine's whole config, which restarts it; after an unknown outcome another version than before is ours."""
        body = {"config": config, "min_secrets_version": secrets_version} | ({"current_version": machine.instance_id} if machine.instance_id else {})

        async def update() -> Machine | None:
            path = f"/apps/{quote(app)}/machines/{quote(machine.id)}"
            return self._machine("update machine", await self._request("POST", path, "update machine", machine.id, body=body, timeout_s=90))

        async def find() -> Machine | None:
            found = await self.get_machine(app, machine.id)
            return found if found.instance_id != machine.instance_id else None
        updated = await self._once(update, find)
        assert updated is not None
        return updated

    async def read_token(self) -> list[Json]:
        """What Fly says of the token in use."""
        told = await self._request("GET", "/tokens/current", "read token")
        return [entry for entry in (told.get("tokens") if isinstance(told, dict) else None) or [] if isinstance(entry, dict)]

    async def list_regions(self) -> set[str]:
        told = await self._request("GET", "/platform/regions", "list regions")
        return {str(row.get("code")) for row in (told.get("regions") if isinstance(told, dict) else None) or [] if isinstance(row, dict)}

    async def wake(self, app: str, machine_id: str) -> None:
        """Start the machine if it is stopped or suspended; raises UpstreamError."""
        machine = await self.get_machine(app, machine_id)
        if machine.state in ("stopped", "suspended") and machine.host_ok:
            log_event("machine_started", vm_id=app, was=machine.state)
            await self.start_machine(app, machine_id)

    async def is_started(self, app: str, machine_id: str, timeout_s: float, *, instance_id: str = "", after_event: str = "") -> bool:
        """Wait until the machine is started, in that version, after that event; False when Fly's wait ran out (1 to 60 s, 408)."""
        query = {"state": "started", "timeout": str(int(min(60, max(1, timeout_s))))}
        query |= {name: value for name, value in (("version", instance_id), ("from_event_id", after_event)) if value}
        path = f"/apps/{quote(app)}/machines/{quote(machine_id)}/wait"

        async def wait() -> bool:
            try:
                await self._request("GET", path, "wait for machine", machine_id, query=query, timeout_s=75)
            except UpstreamUnavailable as error:
                if error.status == HTTPStatus.REQUEST_TIMEOUT:
                    return False
                raise
            return True
        return await self._repeatably(wait)


class Ambiguous(CockpitError):
    """Carries an error past the retry loop: the call may have taken effect."""

    def __init__(self, error: UpstreamUnavailable) -> None:
        super().__init__(str(error))
        self.error = error


class NameTaken(UpstreamRejected):
    """The app's name belongs to another organisation: nothing of ours was made."""


def explain_fly(raw: bytes) -> tuple[str, str]:
    """Fly's words and machine-readable code: `error` or `message`, `status`; else the raw text."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        # Whole: of a secret cut in two neither half would be found.
        return body if isinstance(body, str) else raw.decode("utf-8", "replace"), ""
    words, code = body.get("error") or body.get("message") or body, body.get("status")
    return words if isinstance(words, str) else json.dumps(words), code if isinstance(code, str) else ""


def told_of_fly(error: UpstreamError, **facts: Any) -> Refusal:
    """What a caller is told when Fly refused or failed."""
    facts |= {"fly_status": error.status, "request_id": error.request_id}
    if is_capacity(error):
        return Refusal("no_capacity", f"Fly has no room: {error}", retry_after_s=60, **facts)
    return Refusal("fly_rejected" if isinstance(error, UpstreamRejected) else "fly_unavailable", str(error), **facts)


def kind_of_address(address: Json) -> str:
    """Fly does not reliably return a type: Flycast addresses start with fdaa:, shared ones say so (fly-go, IsFlycast)."""
    ip = str(address.get("ip") or "")
    if ip.startswith("fdaa:"):
        return "private_v6"
    if address.get("shared"):
        return "shared_v4"
    return "v6" if ":" in ip else "v4"


# --- Twilio ---

EMPTY_TWIML = '<?xml version="1.0" encoding="UTF-8"?><Response/>'
PART_UNITS = 1600  # Twilio's limit on Body (21617); emoji count as two, so UTF-16 units are counted
MAX_PARTS = 8  # well under the 15 quick replies after which Twilio's loop guard (14107) steps in
SEND_LIMIT_S = 3600.0
SIGNATURE_DIGESTS = {"HMAC_SHA1": "sha1", "HMAC_SHA256": "sha256"}
TERMINAL_CONTROL = re.compile(r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x9c|\x1b\\)?|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]")
UNSENDABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# What SmartEncoded swaps for GSM-7 characters (Twilio's segment calculator), for comparing words with what Twilio lists.
SMART_ENCODING = str.maketrans({
    **dict.fromkeys("\u00ab\u00bb\u201c\u201d\u02ba\u02ee\u201f\u275d\u275e\u301d\u301e\uff02", '"'),
    **dict.fromkeys("\u2018\u2019\u02bb\u02c8\u02bc\u02bd\u02b9\u201b\uff07\u00b4\u02ca\u0060\u02cb\u275b\u275c\u0313\u0314\ufe10\ufe11", "'"),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u02d7", "-"), **dict.fromkeys("\u2026", "..."),
    **dict.fromkeys("\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t", " "), **dict.fromkeys("\u200b\u2060\ufeff", ""),
})


@functools.lru_cache(maxsize=16)
def hmac_of(token: str, algorithm: str) -> hmac.HMAC:
    """An HMAC with its key already digested, to be copied: a third of the cost of making one per webhook."""
    return hmac.new(token.encode(), digestmod=SIGNATURE_DIGESTS[algorithm])


def twilio_signature(token: str, url: str, pairs: Iterable[tuple[str, str]], algorithm: str = "HMAC_SHA1") -> str:
    """base64 HMAC of the URL and the decoded form fields sorted by name, distinct values of a repeated name sorted (Twilio, Webhooks security)."""
    digest = hmac_of(token, algorithm).copy()
    digest.update((url + "".join([name + value for name, value in sorted(set(pairs))])).encode())
    return base64.b64encode(digest.digest()).decode()


@functools.lru_cache(maxsize=256)
def signed_urls(url: str) -> tuple[str, ...]:
    """The forms of a webhook's URL that Twilio may have signed: as it is, without its port, with the default one."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    bare = host[:-len(str(parts.port)) - 1] if parts.port else host
    rest = url.split("://", 1)[1][len(parts.netloc):].split("#", 1)[0]
    default = 443 if parts.scheme == "https" else 80
    return tuple(dict.fromkeys(f"{parts.scheme}://{name}{rest}" for name in (bare, f"{bare}:{parts.port or default}")))


def is_signed(token: str, url: str, pairs: Sequence[tuple[str, str]], header: str | None, *, body: bytes | None = None, algorithm: str = "HMAC_SHA1") -> bool:
    """Whether Twilio signed this webhook with `token`; `body` is that of a JSON webhook, whose SHA-256 stands in the URL."""
    if not header or algorithm not in SIGNATURE_DIGESTS:
        return False
    if body is not None:
        told = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True)).get("bodySHA256", "")
        if not hmac.compare_digest(hashlib.sha256(body).hexdigest().encode(), told.encode()):
            return False
    given = header.encode("utf-8", "surrogateescape")
    return any(hmac.compare_digest(twilio_signature(token, form, pairs, algorithm).encode(), given) for form in signed_urls(url))


def twiml(message: str = "") -> str:
    """A TwiML document that texts `message` back, or nothing."""
    if not message:
        return EMPTY_TWIML
    return EMPTY_TWIML.replace("<Response/>", f"<Response><Message>{escape(clean_text(message))}</Message></Response>")


def parse_form(raw: bytes) -> list[tuple[str, str]]:
    """A form's decoded fields in order, blank ones kept; raises ValueError when it is not UTF-8 or has over 1,000 fields."""
    pairs, fields = [], raw.decode().split("&")
    if len(fields) > 1000:
        raise ValueError("too many fields")
    for part in fields:
        if part:
            pairs.append(decode_field(part) if len(part) < 80 else decode_field.__wrapped__(part))
    return pairs


@functools.lru_cache(maxsize=4096)
def decode_field(part: str) -> tuple[str, str]:
    """One `name=value` of a form, decoded; most of a webhook's fields are the same in every one, so short ones are cached."""
    name, _, value = part.partition("=")
    if "%" in part or "+" in part:
        return unquote_plus(name, errors="strict"), unquote_plus(value, errors="strict")
    return name, value


def parse_inbound(pairs: Sequence[tuple[str, str]], arrived: float) -> InboundMessage:
    """A webhook's form as a message; raises Refusal when it has no MessageSid."""
    fields = dict(reversed(pairs))
    sid = fields.get("MessageSid", "")
    if not re.fullmatch(r"[A-Za-z0-9]{2,64}", sid):
        raise Refusal("malformed", "MessageSid is missing or not a SID")
    numbers = range(10) if fields.get("NumMedia", "0") != "0" else ()
    media = tuple((fields[f"MediaUrl{n}"], fields.get(f"MediaContentType{n}", "")) for n in numbers if f"MediaUrl{n}" in fields)
    return InboundMessage(sid=sid, sender=fields.get("From", ""), recipient=fields.get("To", ""),
                          body=fields.get("Body", ""), arrived=arrived, media=media, opt_out=fields.get("OptOutType", ""))


def clean_text(text: str) -> str:
    """Text without terminal control sequences and without characters that XML or SMS cannot carry."""
    if not UNSENDABLE.search(text):
        return text
    return UNSENDABLE.sub("", TERMINAL_CONTROL.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def utf16_units(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text)


def cut_within(text: str, start: int, units: int) -> int:
    """Where to cut `text[start:]` so that it fits: behind a line end, else behind a word, in the second half, else anywhere."""
    end = min(len(text), start + units)
    while (excess := utf16_units(text[start:end]) - units) > 0:
        end -= (excess + 1) // 2
    if end == len(text):
        return end
    half = start + (end - start) // 2
    for mark in ("\n", " "):
        if (found := text.rfind(mark, half, end)) >= 0:
            return found + 1
    return end


def split_text(text: str) -> list[str]:
    """Parts of at most 1,600 UTF-16 units, numbered `(1/3) ` when there are several; of more than 8 the last says how much is left out."""
    if len(text) <= PART_UNITS // 2 or (len(text) <= PART_UNITS and utf16_units(text) <= PART_UNITS):
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


def quoted(text: str) -> str:
    """The start of a text, for a notice."""
    return clean_text(text)[:80]


@dataclass(frozen=True, slots=True)
class Ruling:
    """What one of Twilio's codes means for a message of ours, and what to tell whoever asks why it did not arrive.

    `act`: `wait` try again, for at most an hour; `mend` the same, and /health says so; `look_up` it may have been sent, see Twilio's list
    before trying again; `once_more` the send lane waits 30 s, then the part goes once more; `as_text` a picture goes as words and a link;
    `opted_out` nothing more until START; `final` this message is given up.
    """

    act: str
    words: str


# Every code of Twilio's dictionary (www.twilio.com/docs/api/errors) that a message of ours can meet, in the create's answer or in a callback.
RULINGS = {code: Ruling(act, words) for codes, act, words in (
    ("20003", "mend", "Twilio refuses our credentials; check TWILIO_ACCOUNT_SID, TWILIO_AUTH_TOKEN or the API key, their region and the account"),
    ("30002", "mend", "the Twilio account is suspended; settle it in Twilio's console"),
    ("20429 20503", "wait", "Twilio is busy; tried again"),
    ("21611", "wait", "this sender's queue at Twilio is full; tried again later"),
    ("20500", "look_up", "Twilio failed inside; looked up before it is sent again"),
    ("14107", "once_more", "Twilio's loop guard stopped it (over 15 quick texts between two numbers); sent once more after 30 s"),
    ("30001 30017 30022 63018", "once_more", "Twilio or the carrier was congested; sent once more after 30 s"),
    ("30008", "once_more", "lost for a reason the carrier does not tell; sent once more"),
    ("21612 21620 30011 30019 11200 11751 12300", "as_text", "it could not be sent as a picture message; a picture goes as words and a link"),
    ("21610", "opted_out", "the owner opted out by STOP; nothing is sent until they text START"),
    ("30004", "final", "the phone blocks us, or its owner opted out; they may text START"),
    ("20404", "final", "Twilio knows no such account; check TWILIO_ACCOUNT_SID, letter by letter"),
    ("21211", "final", "Twilio says that this is not a phone number; provision the VM with the right one"),
    ("21266", "final", "the number is the gateway's own; provision the VM with the engineer's"),
    ("21212 21606", "final", "our number is not this account's or cannot send this; check TWILIO_PHONE_NUMBER"),
    ("21701 21702 21703 21704 21705", "final", "the Messaging Service is wrong or has no number; mend it in Twilio's console"),
    ("21408", "final", "texts to this country are not enabled; allow it under Geo Permissions in Twilio's console"),
    ("21602 21603 21604 21609 21617 21623 21624", "final", "Twilio found the message malformed; this is a fault of cockpit or of PUBLIC_URL"),
    ("21608", "final", "a trial account sends to verified numbers only; verify this one or upgrade the Twilio account"),
    ("21614 21635 30006", "final", "the number is a landline or cannot be reached; provision the VM with a mobile number"),
    ("30003", "final", "the phone was off or out of reach"),
    ("30005", "final", "the carrier does not know this number; check it"),
    ("30007", "final", "filtered as spam by Twilio or the carrier; see the message in Twilio's console, repeating it makes it worse"),
    ("30410", "final", "the carrier did not answer in time; it may have arrived, so it is not sent again"),
    ("30023 30027", "final", "T-Mobile's daily limit is used up until midnight Pacific time; raise the campaign's trust score"),
    ("30032", "final", "the toll-free number is not verified; verify it in Twilio's console"),
    ("30034 30035", "final", "the number is not registered for texts in the US (A2P 10DLC) or not yet; register brand and campaign in Twilio's console"),
    ("30036", "final", "it waited too long in Twilio's queue"),
    ("30450", "final", "Twilio's SMS pumping protection blocked it; look into it before texting on"),
    ("63016", "final", "WhatsApp allows answers only within 24 h of the owner's last text; they should text first"),
) for code in codes.split()}
encoded = functools.lru_cache(maxsize=20_000)(quote_plus)


def explain_code(code: str) -> str:
    """One of Twilio's codes in plain words, with the cure."""
    ruling = RULINGS.get(code)
    return f"Twilio {code}: {ruling.words}" if ruling else f"Twilio {code}: see www.twilio.com/docs/api/errors/{code}"


def act_on(error: UpstreamError) -> str:
    """What to do about a failed call to Twilio: by its code; a code nobody knows by what is known of the call."""
    if error.code in RULINGS:
        return RULINGS[error.code].act
    if isinstance(error, UpstreamUnavailable | UpstreamUnreadable):
        return "look_up" if error.maybe_done else "wait"
    return "mend" if error.status == HTTPStatus.UNAUTHORIZED else "final"


class Sms(NamedTuple):
    """One message to hand to Twilio: words, or the address of a picture; `callback` is where Twilio tells what became of it."""

    sender: str
    recipient: str
    body: str
    media: str = ""
    callback: str = ""


class TwilioClient:
    """Twilio's Messages resource (twilio-oai, twilio_api_v2010.json); form-encoded, basic auth, no idempotency key exists."""

    def __init__(self, session: aiohttp.ClientSession, settings: Settings, clock: Clock, metrics: Metrics, owner: Owner, burst: Burst) -> None:
        self._session, self._settings, self._clock, self._metrics = session, settings, clock, metrics
        self._messages = URL(f"{settings.twilio_url}/2010-04-01/Accounts/{settings.twilio_account_sid}/Messages.json")
        user, password = (settings.twilio_api_key, settings.twilio_api_secret) if settings.twilio_api_key else (settings.twilio_account_sid, settings.twilio_auth_tokens[0])
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {basic}", "Accept": "application/json"}
        self._call = Call(self._messages, self._headers | {"Content-Type": "application/x-www-form-urlencoded"}, burst)
        self._time_limit, self._timeouts, self._media_timeouts = TimeLimit(30, clock, owner), aiohttp.ClientTimeout(sock_connect=10), aiohttp.ClientTimeout(total=30, sock_connect=10)
        self._claimed: OrderedDict[str, None] = OrderedDict()  # SIDs that are known to be some other message than one looked for
        self.retry = Retry(attempts=1000, base_s=0.5, cap_s=60.0, budget_s=SEND_LIMIT_S)
        self.cannot_list = False
        self.trouble = ""

    def claim(self, sid: str) -> None:
        """Remember that this message of Twilio's is one we know, so that no look-up takes it for another."""
        self._claimed[sid] = None
        if len(self._claimed) > 10_000:
            self._claimed.popitem(last=False)

    def last_claimed(self) -> list[str]:
        return list(self._claimed)[-1000:]

    async def _read(self, operation: str, url: URL) -> Any:
        return await self._answer(operation, self._session.get(url, headers=self._headers, allow_redirects=False, timeout=self._timeouts))

    async def _answer(self, operation: str, asked: Awaitable[aiohttp.ClientResponse]) -> Any:
        """What Twilio says to one request; raises UpstreamError."""
        def fault(kind: type[UpstreamError], words: str, **facts: Any) -> UpstreamError:
            return kind("twilio", operation, words=scrub(words, self._settings.twilio_auth_tokens), **facts)

        status, began = 0, self._clock.monotonic()
        try:
            with self._time_limit:
                response = await asked
                status = response.status
                raw = await read_at_most(response, MAX_UPSTREAM_BYTES) or b""
        except aiohttp.ClientConnectorError as error:
            raise fault(UpstreamUnavailable, f"not reached ({type(error).__name__})") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise fault(UpstreamUnavailable, f"no answer ({type(error).__name__})", maybe_done=True) from error
        finally:
            self._metrics.upstream.observe(self._clock.monotonic() - began, "twilio", operation, STATUS_CLASSES[status // 100])
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            answer = None
        if status < 300:
            return answer
        told = answer if isinstance(answer, dict) else {}
        code = str(told.get("code") or "")
        self._metrics.twilio_errors.add(code if re.fullmatch(r"[0-9]{1,5}", code) else "none")
        words = f"{code} {told.get('message') or raw[:200].decode('utf-8', 'replace')}".strip()
        # Twilio: a 429 was never processed; what came of a 5xx other than 503 is unknown.
        raise fault(kind_of_failure(status), words, status=status, code=code, request_id=response.headers.get("Twilio-Request-Id", ""),
                    maybe_done=status >= 500 and status != 503, retry_after_s=read_retry_after(response.headers, self._clock))

    async def create(self, sms: Sms) -> str:
        """Hand one message to Twilio, one attempt; returns its SID, empty when the answer was not readable."""
        form = f"SmartEncoded=true&From={encoded(sms.sender)}&To={encoded(sms.recipient)}"
        if sms.body:
            form += f"&Body={quote_plus(sms.body)}"
        if sms.media:
            form += f"&MediaUrl={quote_plus(sms.media)}"
        if sms.callback:
            form += f"&StatusCallback={encoded(sms.callback)}"
        answer = await self._answer("create message", self._call.post(self._session, form.encode(), self._timeouts, {}))
        sid = answer.get("sid") if isinstance(answer, dict) else None
        if not isinstance(sid, str):
            return ""
        self.claim(sid)
        return sid

    async def deliver(self, sms: Sms, attempted_at: float | None = None, *, is_wanted: Callable[[], bool] = lambda: True) -> str:
        """Hand one message to Twilio exactly once, trying for at most an hour and while it is wanted; raises UpstreamError when that is hopeless.

        `attempted_at` (wall clock) is when an earlier process may have sent it: then Twilio's list is read first.
        """
        failures, began = 0, self._clock.monotonic()
        while True:
            started = self._clock.now()
            try:
                if attempted_at is not None and (sid := await self._find(sms, attempted_at)):
                    return sid
                attempted_at = None
                sid = await self.create(sms)
                self.trouble = ""
                return sid
            except UpstreamError as error:
                failures, act = failures + 1, act_on(error)
                pause = max(self._clock.uniform(0, self.retry.ceiling(failures)), error.retry_after_s or 0)
                if act not in ("wait", "mend", "look_up") or self._clock.monotonic() + pause - began > self.retry.budget_s:
                    raise
                if act == "mend":
                    self.trouble = f"texts wait: {explain_code(error.code or '20003')}"
                if act == "look_up" and error.operation == "create message":
                    attempted_at = started
                log_event("send_retry", level=logging.WARNING, error=str(error), attempt=failures + 1, pause_s=round(pause, 2))
                await self._clock.sleep(pause)
                if not is_wanted():
                    raise

    async def _find(self, sms: Sms, attempted_at: float) -> str:
        """The SID of a message with these words that Twilio took at or after `attempted_at`, or nothing."""
        if self.cannot_list:
            return ""
        wanted, earliest = comparable(sms.body), int(attempted_at)
        try:
            async for message in self.list_messages({"To": sms.recipient, "From": sms.sender}, pages=10):
                sid = str(message.get("sid") or "")
                if sid not in self._claimed and comparable(str(message.get("body") or "")) == wanted and (read_date(message) or 0) >= earliest:
                    self.claim(sid)
                    return sid
        except UpstreamRejected as error:
            if act_on(error) == "mend":
                raise
            self.give_up_listing(error)
        return ""

    async def body_of(self, sid: str) -> str:
        """The words of a message that Twilio has; raises UpstreamError."""
        answer = await self._read("fetch message", self._messages.parent / "Messages" / f"{sid}.json")
        return str(answer.get("body") or "") if isinstance(answer, dict) else ""

    async def media_of(self, sid: str) -> tuple[tuple[str, str], ...]:
        """The addresses and types of the pictures of a message that Twilio has; raises UpstreamError."""
        answer = await self._read("list media", self._messages.parent / "Messages" / sid / "Media.json")
        listed = answer.get("media_list") if isinstance(answer, dict) else None
        return tuple((self._settings.twilio_url + str(media["uri"]).removesuffix(".json"), str(media.get("content_type") or ""))
                     for media in listed or () if isinstance(media, dict) and str(media.get("uri", "")).startswith("/"))

    @contextlib.asynccontextmanager
    async def open_media(self, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """A picture that a phone sent, not yet read. Our credentials go to Twilio's own address, never to where it redirects."""
        url, headers = URL(self._settings.twilio_url + path, encoded=True), self._headers
        for _ in range(5):
            async with self._session.get(url, headers=headers | {"Accept": "*/*"}, allow_redirects=False, timeout=self._media_timeouts) as response:
                if response.status not in (301, 302, 303, 307, 308) or "Location" not in response.headers:
                    yield response
                    return
                url, headers = url.join(URL(response.headers["Location"])), {}
        raise Refusal("not_found", "the picture is not to be had: Twilio redirects too often")

    def give_up_listing(self, error: UpstreamRejected) -> None:
        """Say once that the list is refused; go on without it when that is for good."""
        # 20008: test credentials may only create. Without the list an unknown outcome is sent again rather than lost.
        if not self.cannot_list:
            log_event("twilio_list_refused", level=logging.WARNING, error=str(error))
        self.cannot_list = error.code == "20008"

    async def list_messages(self, query: Mapping[str, str], pages: int) -> AsyncIterator[Json]:
        """Messages matching `query`, over at most `pages` pages; raises UpstreamError."""
        url: URL | None = self._messages.with_query({**query, "PageSize": "1000"})
        while url is not None and pages > 0:
            answer = await self._read("list messages", url)
            if not isinstance(answer, dict) or not isinstance(answer.get("messages"), list):
                raise UpstreamUnreadable("twilio", "list messages", words="an answer without messages")
            for message in answer["messages"]:
                if isinstance(message, dict):
                    yield message
            following = answer.get("next_page_uri")
            url = URL(self._settings.twilio_url + following, encoded=True) if isinstance(following, str) and following.startswith("/") else None
            pages -= 1

    async def read_account(self) -> Json:
        """The account as Twilio knows it."""
        told = await self._read("read account", URL(str(self._messages).replace("/Messages.json", ".json")))
        return told if isinstance(told, dict) else {}

    async def find_number(self, phone: str) -> Json | None:
        """The account's phone number of this name, with where its texts go."""
        told = await self._read("find number", self._messages.with_name("IncomingPhoneNumbers.json").with_query({"PhoneNumber": phone}))
        numbers = told.get("incoming_phone_numbers") if isinstance(told, dict) else None
        return next((number for number in numbers or [] if isinstance(number, dict) and number.get("phone_number") == phone), None)


def comparable(body: str) -> str:
    """Words as they compare after SmartEncoded."""
    return " ".join(body.translate(SMART_ENCODING).split())


def read_date(message: Json) -> float | None:
    """When Twilio made a message, wall-clock seconds; its dates are RFC 2822."""
    for name in ("date_created", "date_sent"):
        with contextlib.suppress(KeyError, ValueError, TypeError):
            return parsedate_to_datetime(message[name]).timestamp()
    return None


# --- The VM ---

MAX_ANSWER_BYTES = 1024 * 1024
MAX_IMAGE_BYTES = 5 * 1024 * 1024
IMAGE_PATH = re.compile(r"/images/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
MAX_IMAGES = 10


class VmAway(CockpitError):
    """The VM could not be reached. `reached`: the command perhaps got there; `cut`: the VM's side broke the connection."""

    def __init__(self, words: str, *, reached: bool, cut: bool) -> None:
        super().__init__(words)
        self.reached, self.cut = reached, cut


class VmBusy(CockpitError):
    """409: another command is running, or this very one."""


class VmSilent(CockpitError):
    """No answer within VM_COMMAND_TIMEOUT_S."""


class VmFailed(CockpitError):
    """An answer with a status that means neither success nor absence."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the VM answered {status}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a VM listens and what to say to it, prepared once per route."""

    command: Call
    health: URL
    headers: Mapping[str, str]


class VmClient:
    """Speaks to VMs, which run their owners' code and are not trusted: no cookies, no redirects, bounded reads."""

    def __init__(self, session: aiohttp.ClientSession, settings: Settings, clock: Clock, owner: Owner, burst: Burst) -> None:
        self._session, self._settings, self._burst = session, settings, burst
        self._command_limit, self._command_timeouts = TimeLimit(settings.vm_command_timeout_s, clock, owner), aiohttp.ClientTimeout(sock_connect=min(10, settings.vm_command_timeout_s / 2))
        self._health_timeout, self._image_timeout = aiohttp.ClientTimeout(total=5), aiohttp.ClientTimeout(total=60, sock_connect=10)

    def endpoint(self, route: Route) -> Endpoint:
        return self._prepared(route.vm_id, route.vm_url, route.key_id)

    @functools.lru_cache(maxsize=20_000)  # noqa: B019 - one client per process, for its whole life
    def _prepared(self, vm_id: str, vm_url: str, key_id: str) -> Endpoint:
        token = vm_token(secret_of(key_id, self._settings.secrets), vm_id)
        headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}  # what is packed may unfold to any size
        return Endpoint(Call(URL(f"{vm_url}/command"), headers | {"Content-Type": "application/json"}, self._burst), URL(f"{vm_url}/health"), headers)

    async def is_healthy(self, route: Route) -> bool:
        """Whether `/health` answers 2xx, one attempt of at most 5 s."""
        try:
            endpoint = self.endpoint(route)
            async with self._session.get(endpoint.health, headers=endpoint.headers, allow_redirects=False, timeout=self._health_timeout) as response:
                await read_at_most(response, MAX_ANSWER_BYTES)
                return response.status < 300
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return False

    def open_image(self, route: Route, path: str) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """One of a VM's images, not yet read."""
        endpoint = self.endpoint(route)
        return self._session.get(URL(route.vm_url + path), headers=endpoint.headers, allow_redirects=False, timeout=self._image_timeout)

    async def command(self, route: Route, sid: str, text: str, media: Sequence[Json]) -> Answer:
        """Run one text; raises VmAway, VmBusy, VmSilent or VmFailed. The Idempotency-Key is the text's MessageSid."""
        body = dump_tight({"text": text, "media": list(media)}).encode()
        try:
            call = self.endpoint(route).command  # its URL may be none: routes.json can be written by hand
            with self._command_limit:
                response = await call.post(self._session, body, self._command_timeouts, {"Idempotency-Key": sid})
                raw, status = await read_at_most(response, MAX_ANSWER_BYTES), response.status
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise VmAway(f"not reached ({type(error).__name__})", reached=False, cut=False) from error
        except TimeoutError as error:
            raise VmSilent from error
        except aiohttp.ClientResponseError:  # not HTTP at all
            return Answer(text="", unreadable=True)
        except (aiohttp.ClientError, ValueError) as error:
            raise VmAway(f"connection dropped ({type(error).__name__})", reached=True, cut=True) from error
        if status < 300:
            return read_answer(raw)
        if status in (502, 503, 504):
            raise VmAway(f"answered {status}", reached=status != 503, cut=status == 504)
        raise VmBusy if status == 409 else VmFailed(status)


def read_answer(raw: bytes | None) -> Answer:
    """What a VM's answer says, whatever its shape."""
    try:
        told = json.loads(raw or b"")
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or not isinstance(text := told.get("text") or "", str):
        return Answer(text="", unreadable=True)
    given = told.get("images") or []
    images = tuple(image["url"] for image in given if isinstance(image, dict) and isinstance(image.get("url"), str)
                   and IMAGE_PATH.fullmatch(image["url"]))[:MAX_IMAGES] if isinstance(given, list) else ()
    code = told.get("exitCode")
    text = clean_text(text).rstrip("\n")
    return Answer(text=text, images=images, exit_code=code if type(code) is int and abs(code) < 2**32 else 0, unreadable=bool(given) and not images and not text.strip())


# --- Provisioning ---

UNDO_CAP_S = 60.0
REFUSED_CAP_S = 300.0
TEARDOWN_WAIT_S = 25.0
LAUNCH_WAIT_S = 10.0
POOL_STATES = ("created", "stopped")  # a machine that waits to be booted for the first time
FAILED_KEPT_S = 3600.0
LOOK_AGAIN_S = (1.0, 4.0, 15.0)  # so a fresh app that Fly does not know (yet) is asked for again


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the onboarding page asks for, checked."""

    phone: str
    credentials: Mapping[str, str] = field(repr=False)
    region: str = ""
    welcome: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One provisioning on its way."""

    order: Order
    vm_id: str
    regions: list[str]  # not yet found full
    task: asyncio.Task[Route] | None = None
    step: str = ""
    launch: str = ""
    began: float = 0.0  # monotonic
    secrets_version: int = 0
    machine: Machine | None = None
    torn_down: bool = False
    pooled: bool = False  # its machine waited in the pool
    seconds: dict[str, float] = field(default_factory=dict)
    moved: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())  # ends with the present step

    async def outcome(self) -> Route:
        """What came of it; raises Refusal. A caller who hangs up stops nothing."""
        assert self.task is not None
        await asyncio.wait({self.task})
        if self.task.cancelled():
            raise Refusal("torn_down", f"{self.vm_id} was deleted before it was set up", vm_id=self.vm_id)
        return self.task.result()

    def end_step(self, seconds: float) -> None:
        self.seconds[self.step] = round(seconds, 3)
        self.moved.set_result(None)
        self.moved = asyncio.get_running_loop().create_future()


def machine_config(settings: Settings, metadata: Mapping[str, str], volume_id: str = "") -> Json:
    """A machine's config: restarted always, one service on port 3000 that Fly's proxy keeps open through a long command."""
    # Fly's proxy may cut a connection that is silent for 60 s; durations of checks are strings, a bare number is nanoseconds.
    options = {"idle_timeout": int(settings.vm_command_timeout_s) + 60}
    port: Json = {"port": 443, "handlers": ["tls", "http"]} if settings.vm_is_public else {"port": 3000, "handlers": ["http"]}
    config: Json = {
        "image": settings.vm_image,
        "env": {"PORT": "3000", "HOST": "0.0.0.0"},
        "guest": guest(settings),
        "restart": {"policy": "always"},
        "services": [{"protocol": "tcp", "internal_port": 3000, "autostart": True, "autostop": "off", "ports": [port | {"http_options": options}]}],
        # It only informs: a check that gates would hide a busy VM from the proxy.
        "checks": {"health": {"type": "http", "kind": "informational", "port": 3000, "method": "GET", "path": "/health",
                              "interval": "15s", "timeout": "5s", "grace_period": "30s"}},
        "metadata": dict(metadata),
    }
    if volume_id:
        config["mounts"] = [{"volume": volume_id, "path": "/data"}]
    else:
        config["rootfs"] = {"persist": "restart"}
    return config


def guest(settings: Settings) -> Json:
    return {"cpu_kind": settings.vm_cpu_kind, "cpus": settings.vm_cpus, "memory_mb": settings.vm_memory_mb}


def gateway_host(settings: Settings) -> str:
    """What tells this gateway from others in the organisation, together with its gateway_id."""
    return urlsplit(settings.public_url).netloc


def place(settings: Settings, vm_id: str, machine: Machine) -> str:
    """The URL a VM is reached at."""
    return settings.vm_url.format(app=vm_id, machine_id=machine.id, region=machine.region)


def pool_shape(settings: Settings) -> str:
    """What a machine of the pool was made for; one of another shape is not claimed."""
    sizes = (settings.vm_cpu_kind, settings.vm_cpus, settings.vm_memory_mb, settings.vm_volume_gb)
    return " ".join([settings.vm_image, *map(str, sizes), ",".join(settings.vm_regions), "public" if settings.vm_is_public else f"private {settings.fly_network}".strip()])


Steps = tuple[tuple[str, Callable[[Job], Awaitable[None]]], ...]


class Provisioner:
    """Makes and destroys VMs. What is begun stands in routes.json before Fly is asked; what fails is undone until Fly confirms."""

    def __init__(self, settings: Settings, clock: Clock, store: RouteStore, fly: FlyClient, vms: VmClient, owner: Owner, metrics: Metrics, *,
                 on_ready: Callable[..., Awaitable[None]], on_gone: Callable[[str, str], Awaitable[None]]) -> None:
        self._settings, self._clock, self._store, self._fly, self._vms, self._owner, self._metrics = settings, clock, store, fly, vms, owner, metrics
        self._on_ready, self._on_gone = on_ready, on_gone
        self.jobs: dict[str, Job] = {}
        self._undoing: dict[str, asyncio.Task[None]] = {}
        self.failed: OrderedDict[str, tuple[float, Json]] = OrderedDict()  # vm_id: when (monotonic), its last record
        self.gone: OrderedDict[str, float] = OrderedDict()  # vm_id: when Fly confirmed (monotonic)
        self.draining = False
        self.closed = ""  # why no VM can be made now
        self.pool_changed = asyncio.Event()
        app, secrets_set = ("app", self._create_app), ("secrets", self._set_secrets)
        make = (("address", self._allocate_addresses), ("volume", self._create_volume), ("machine", self._create_machine))
        until_ready = (("start", self._wait_started), ("health", self._wait_healthy))
        self.long_way: Steps = (app, secrets_set, *make, *until_ready)
        self.from_pool: Steps = (secrets_set, ("launch", self._launch), *until_ready)
        self.into_pool: Steps = (app, *make, ("image", self._wait_prepared))

    # Asking for a VM

    def begin(self, order: Order) -> Job:
        """Take an order on; raises Refusal. There is no await between the look-up and the record, so one of many wins."""
        self._check_number_free(order.phone)
        if self.draining:
            raise Refusal("draining", "this gateway is shutting down; try again in a moment")
        if self.closed:
            raise Refusal("fly_unavailable", self.closed, retry_after_s=10)
        if len(self.jobs) >= self._settings.provision_limit:
            raise Refusal("too_many", f"{len(self.jobs)} VMs are being set up already (PROVISION_LIMIT)", retry_after_s=10)
        if self._settings.vm_limit and len(self._store.routes) >= self._settings.vm_limit:
            raise Refusal("vm_limit", f"there are {len(self._store.routes)} VMs, as many as VM_LIMIT allows")
        job = self.new_job(order)
        waiting = self._claim(job)
        self._store.put(order.phone, self.blank(job) if waiting is None else replace(
            waiting, state="provisioning", step="", created_at=timestamp(self._clock.now()), key_id=fingerprint(self._settings.secrets[0]), extra={"from_pool": True}))
        self.jobs[job.vm_id] = job
        job.task = self._owner.start(self._provision(job), f"provision {job.vm_id}")
        log_event("provision_begun", vm_id=job.vm_id, phone=mask_phone(order.phone))
        return job

    def new_job(self, order: Order) -> Job:
        return Job(order=order, vm_id=f"{self._settings.vm_app_prefix}-{self._clock.random_id()}", regions=list(self._regions(order)),
                   launch=self._clock.random_id() + self._clock.random_id(), began=self._clock.monotonic())

    def blank(self, job: Job) -> Route:
        """The record of a machine that is yet to be made."""
        return Route(vm_id=job.vm_id, state="provisioning", image=self._settings.vm_image, region=job.order.region,
                     created_at=timestamp(self._clock.now()), key_id=fingerprint(self._settings.secrets[0]))

    def _claim(self, job: Job) -> Route | None:
        """A machine of the pool in the best region, for this job; there is no await before it leaves the pool, so no two jobs get one."""
        if not self._settings.pool_size:
            return None
        fitting = {vm_id: str(entry.get("region")) for vm_id, entry in self._store.pool.items()
                   if entry.get("state") == "ready" and entry.get("shape") == pool_shape(self._settings)}
        # Fly may have chosen another name than ours: VM_REGION takes its groups too (`us`, `eu`).
        for region in job.regions if job.order.region else (*job.regions, *fitting.values()):
            if vm_id := next((vm_id for vm_id, where in fitting.items() if where == region), ""):
                job.vm_id, job.pooled = vm_id, True
                self._metrics.pool_claims.add("claimed")
                self.pool_changed.set()
                return Route.from_json(self._store.pool.pop(vm_id))
        self._metrics.pool_claims.add("missed")
        log_event("pool_missed", level=logging.WARNING, regions=",".join(job.regions), pool=len(self._store.pool))
        return None

    def _check_number_free(self, phone: str) -> None:
        route = self._store.routes.get(phone)
        if route is None:
            return
        if route.state == "failed":  # its VM is gone: the number may have a new one
            self._store.begin_undo(phone, "replaced")
            self._start_undo(route.vm_id)
            return
        raise Refusal("phone_taken", f"this number has the VM {route.vm_id} ({route.state}); delete it first", vm_id=route.vm_id)

    async def _provision(self, job: Job) -> Route:
        try:
            async with time_limit(self._clock, self._settings.provision_timeout_s):
                await self._store.commit()
                await self._make(job)
                route = self._update(job, state="ready", step="", last_error="", extra={"steps": job.seconds} | ({"from_pool": True} if job.pooled else {}))
                await self._store.commit()
        except asyncio.CancelledError:
            if not job.torn_down:  # shutting down: the next start undoes it
                raise Refusal("draining", f"the gateway shut down while {job.vm_id} was being set up; it will be undone") from None
            await self._abandon(job, refusal := Refusal("torn_down", f"{job.vm_id} was deleted while it was being set up", vm_id=job.vm_id))
            raise refusal from None
        except Exception as error:  # also one that nobody foresaw must not keep the number
            refusal = await self._explain(job, error)
            await self._abandon(job, refusal, made_nothing=isinstance(error, NameTaken))
            raise refusal from error
        finally:
            self.jobs.pop(job.vm_id, None)
        self._metrics.provision.observe(self._clock.monotonic() - job.began, "ready_from_pool" if job.pooled else "ready")
        log_event("provision_ready", vm_id=job.vm_id, phone=mask_phone(job.order.phone), seconds=job.seconds)
        await self._on_ready(job.vm_id, welcome=job.order.welcome)
        return route

    def _update(self, job: Job, **changes: Any) -> Route:
        """Change the job's record in memory; a commit follows where the change must be on disk."""
        record = replace(self._record(job), **changes)
        if job.order.phone:
            self._store.put(job.order.phone, record)
        else:
            self._store.pool[job.vm_id] = record.to_json()
        return record

    def _record(self, job: Job) -> Route:
        """A job's route; one without a phone is on its way into the pool."""
        return self._store.routes[job.order.phone] if job.order.phone else Route.from_json(self._store.pool[job.vm_id])

    async def _make(self, job: Job) -> None:
        """Out of the pool or the long way; what was claimed and turns out to be gone is made anew under its name."""
        try:
            await self.take(job, self.from_pool if job.pooled else self.long_way)
        except UpstreamNotFound as error:
            if not job.pooled or job.step != "secrets":
                raise
            self._refuse_claim(job, error)
            job.pooled = False
            self._update(job, machine_id="", volume_id="", vm_url="", extra={})
            await self.take(job, self.long_way)

    def _refuse_claim(self, job: Job, error: UpstreamError) -> None:
        self._metrics.pool_claims.add("refused")
        log_event("pool_launch_refused", level=logging.WARNING, vm_id=job.vm_id, error=str(error))

    async def take(self, job: Job, steps: Steps) -> None:
        """Take the steps one after the other, each noted and timed."""
        for name, step in steps:
            began, job.step = self._clock.monotonic(), name
            self._update(job, step=name)
            await step(job)
            job.end_step(seconds := self._clock.monotonic() - began)
            self._metrics.provision_step.observe(seconds, name)

    # The steps, in order

    async def _create_app(self, job: Job) -> None:
        await self._fly.create_app(job.vm_id)

    async def _when_visible(self, call: Callable[[], Awaitable[T]], patience_s: float = FRESH_APP_S) -> T:
        """Fly may answer 404 or 401 for an app it has just made."""
        deadline, pause = self._clock.monotonic() + patience_s, 0.2
        while True:
            try:
                return await call()
            except UpstreamRejected as error:
                hidden = error.status in (401, 404) or "failed to get app" in error.words
                if not hidden or self._clock.monotonic() > deadline:
                    raise
            await self._clock.sleep(pause)
            pause = min(2.0, pause * 2)

    async def _set_secrets(self, job: Job) -> None:
        values = {**job.order.credentials, **self.own_secrets(job.vm_id)}
        job.secrets_version = await self._when_visible(lambda: self._fly.set_secrets(job.vm_id, values), SEEN_APP_S if job.pooled else FRESH_APP_S)

    def own_secrets(self, vm_id: str) -> dict[str, str]:
        return {"COCKPIT_URL": self._settings.public_url, "COCKPIT_TOKEN": vm_token(self._settings.secrets[0], vm_id)}

    async def _allocate_addresses(self, job: Job) -> None:
        if self._settings.vm_is_public:
            for kind in ("shared_v4", "v6"):
                await self._when_visible(functools.partial(self._fly.ensure_address, job.vm_id, kind))
        else:
            # The address lives on the network its callers are on: the gateway's, not the app's own.
            await self._when_visible(lambda: self._fly.ensure_address(job.vm_id, "private_v6", self._settings.fly_network))

    async def _create_volume(self, job: Job) -> None:
        """In the first region that has room; a machine that finds none beside it comes back here for the next."""
        while self._settings.vm_volume_gb:
            try:
                volume_id, region = await self._when_visible(lambda: self._fly.ensure_volume(job.vm_id, job.regions[0], guest(self._settings)))
            except UpstreamError as error:
                self._next_region(job, error)
            else:
                self._update(job, volume_id=volume_id, region=region)
                await self._store.commit()
                return

    def _next_region(self, job: Job, error: UpstreamError) -> None:
        """Give up on a region that is full; raises the error when it is another or when this was the last."""
        if not is_capacity(error) or len(job.regions) < 2:
            raise error
        log_event("region_full", level=logging.WARNING, vm_id=job.vm_id, region=job.regions.pop(0), error=str(error))

    def _regions(self, order: Order) -> tuple[str, ...]:
        return (order.region,) if order.region else self._settings.vm_regions

    def stamp(self, vm_id: str, phone: str) -> dict[str, str]:
        """The metadata that says whose a machine is; without a phone it is the pool's."""
        ours = {"cockpit_gateway": f"{gateway_host(self._settings)}/{self._store.gateway_id}"}
        if not phone:
            return ours | {"cockpit_pool": "1"}
        return ours | {"cockpit_phone": phone, "cockpit_owner": owner_mark(self._settings.secrets[0], vm_id, phone)}

    async def _create_machine(self, job: Job) -> None:
        while job.machine is None:
            route = self._record(job)
            # One on its way into the pool is not booted; one that Fly would not boot out of it leaves its name behind.
            how: Json = {"min_secrets_version": job.secrets_version} if job.order.phone else {"skip_launch": True}
            # Fly reads a list of regions itself; a volume pins the machine to its own.
            request = {"name": f"{job.vm_id}-2" if job.pooled else job.vm_id, "region": route.region if route.volume_id else ",".join(job.regions),
                       "config": self._config(job, route.volume_id)} | how
            try:
                job.machine = await self._when_visible(functools.partial(self._fly.create_machine, job.vm_id, request, job.launch))
            except UpstreamError as error:
                self._next_region(job, error)
                if route.volume_id:
                    await self._fly.delete_volume(job.vm_id, route.volume_id)
                    await self._create_volume(job)
        self._update(job, machine_id=job.machine.id, region=job.machine.region or job.regions[0], vm_url=place(self._settings, job.vm_id, job.machine))
        await self._store.commit()

    def _config(self, job: Job, volume_id: str) -> Json:
        return machine_config(self._settings, self.stamp(job.vm_id, job.order.phone) | {"cockpit_launch": job.launch}, volume_id)

    async def _wait_prepared(self, job: Job) -> None:
        """Until a machine that is not booted rests: then Fly has its image on its host."""
        assert job.machine is not None
        while (machine := await self._when_visible(functools.partial(self._fly.get_machine, job.vm_id, job.machine.id))).state not in POOL_STATES:
            if machine.state in ("failed", "launch_failed", "destroying", "destroyed", "started"):
                raise Refusal("vm_unhealthy", f"a machine for the pool is {machine.state}")
            await self._clock.sleep(self._clock.uniform(0.2, 1.0))

    async def _launch(self, job: Job) -> None:
        """Make a machine of the pool the user's and boot it, in one update; one that Fly will not boot is replaced by one made the long way."""
        route = self._store.routes[job.order.phone]
        try:
            waiting = await self._fly.get_machine(job.vm_id, route.machine_id)
            if waiting.state not in POOL_STATES or not waiting.host_ok:
                raise UpstreamRejected("fly", "launch machine", words=f"it is {waiting.state}" if waiting.host_ok else "its host is not well")
            job.machine = await self._fly.update_machine(job.vm_id, waiting, self._config(job, route.volume_id), job.secrets_version)
            started = await self._fly.is_started(job.vm_id, job.machine.id, LAUNCH_WAIT_S, instance_id=job.machine.instance_id)
            if not started and (await self._fly.get_machine(job.vm_id, job.machine.id)).state in ("created", "stopped"):
                await self._fly.start_machine(job.vm_id, job.machine.id)
            self._update(job, vm_url=place(self._settings, job.vm_id, job.machine))  # VM_URL may be another than when it was made
        except UpstreamError as error:
            if not (isinstance(error, UpstreamRejected) or is_capacity(error)):
                raise
            self._refuse_claim(job, error)
            await self._fly.delete_machine(job.vm_id, route.machine_id)
            job.machine, job.launch = None, self._clock.random_id() + self._clock.random_id()
            await self._create_machine(job)
            job.pooled = False

    async def _wait_started(self, job: Job) -> None:
        assert job.machine is not None
        await self.wait_started(job.vm_id, job.machine)

    async def wait_started(self, vm_id: str, machine: Machine, after_event: str = "") -> None:
        """Wait until Fly calls the machine started (the caller bounds the wait); raises Refusal when that will not be."""
        version = "" if after_event else machine.instance_id
        while not await self._when_visible(lambda: self._fly.is_started(vm_id, machine.id, self._settings.provision_timeout_s, instance_id=version, after_event=after_event)):
            now = await self._fly.get_machine(vm_id, machine.id)
            if now.state in ("failed", "launch_failed", "destroying", "destroyed"):
                raise Refusal("vm_unhealthy", f"the machine did not start: Fly says {now.state}", vm_id=vm_id)
            if now.state == "stopped":  # seen after updates; while Fly is still replacing it, it refuses to start it
                with contextlib.suppress(UpstreamRejected):
                    await self._fly.start_machine(vm_id, machine.id)

    async def _wait_healthy(self, job: Job) -> None:
        await self.wait_healthy(self._store.routes[job.order.phone])

    async def wait_healthy(self, route: Route) -> None:
        """Poll until the VM answers /health (the caller bounds the wait)."""
        failures = 0
        while not await self._vms.is_healthy(route):
            failures += 1
            await self._clock.sleep(self._clock.uniform(0.02, min(0.5, 0.05 * 2 ** min(failures, 5))))

    # When it fails

    async def _explain(self, job: Job, error: Exception) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, StoreError):
            return Refusal("storage", f"{error}; nothing was kept", vm_id=job.vm_id)
        if isinstance(error, UpstreamError):
            return told_of_fly(error, vm_id=job.vm_id, step=job.step, regions=self._regions(job.order))
        if not isinstance(error, TimeoutError):
            log.error("provision_broken", exc_info=error, extra={"fields": [{"vm_id": job.vm_id, "step": job.step}]})
            return Refusal("internal", "something went wrong here; the log says what", vm_id=job.vm_id, step=job.step)
        limit = f"within {self._settings.provision_timeout_s:g} s (PROVISION_TIMEOUT_S)"
        if job.step not in ("start", "health"):
            return Refusal("fly_unavailable", f"Fly did not finish the step {job.step} {limit}", retry_after_s=10, vm_id=job.vm_id, step=job.step)
        if job.step == "health" and await self._passes_flys_check(job):
            return Refusal("vm_unreachable", f"Fly's own check of the VM passes, but {self._store.routes[job.order.phone].vm_url} does not answer from here {limit}; "
                           "check VM_NETWORK, and that FLY_NETWORK names the network this gateway is on", vm_id=job.vm_id, step=job.step)
        return Refusal("vm_unhealthy", f"the VM did not answer /health {limit}", vm_id=job.vm_id, step=job.step)

    async def _passes_flys_check(self, job: Job) -> bool:
        assert job.machine is not None
        with contextlib.suppress(UpstreamError, TimeoutError):
            async with time_limit(self._clock, 10):
                return (await self._fly.get_machine(job.vm_id, job.machine.id)).checks_pass
        return False

    async def _abandon(self, job: Job, refusal: Refusal, *, made_nothing: bool = False) -> None:
        """Free the number, tell whoever waits, and start the undo; the caller's error does not wait for it."""
        self.jobs.pop(job.vm_id, None)  # from here on a teardown has nothing to cancel
        self._metrics.provision.observe(self._clock.monotonic() - job.began, refusal.code)
        log_event("provision_failed", level=logging.WARNING, vm_id=job.vm_id, step=job.step, code=refusal.code, error=refusal.detail)
        state = "deleting" if job.torn_down else "failed"
        self._remember_failed(self.describe(job.order.phone, self._store.routes[job.order.phone]) | {"state": state, "last_error": refusal.detail})
        if made_nothing or not (job.step or job.pooled):  # a machine of the pool is there before the first step
            self._store.drop(job.order.phone)
        else:
            self._store.begin_undo(job.order.phone, "torn_down" if job.torn_down else "failed")
        await self._on_gone(job.vm_id, "failed")
        with contextlib.suppress(StoreError):
            await self._store.commit()
        if job.vm_id in self._store.undo:
            self._start_undo(job.vm_id)

    def _remember_failed(self, record: Json) -> None:
        now = self._clock.monotonic()
        self.failed[record["vm_id"]] = (now, record)
        while self.failed and (len(self.failed) > 1000 or next(iter(self.failed.values()))[0] < now - FAILED_KEPT_S):
            self.failed.popitem(last=False)

    # Undoing

    def _start_undo(self, vm_id: str) -> asyncio.Task[None]:
        if vm_id not in self._undoing:
            self._undoing[vm_id] = self._owner.start(self._undo(vm_id), f"undo {vm_id}")
        return self._undoing[vm_id]

    async def _undo(self, vm_id: str) -> None:
        """Delete the app until Fly confirms that it is gone, however long that takes."""
        failures = 0
        try:
            while True:
                try:
                    for pause in LOOK_AGAIN_S if self._is_fresh(vm_id) else ():
                        if await self._delete_and_confirm(vm_id):
                            break
                        await self._clock.sleep(pause)
                    else:
                        await self._delete_and_confirm(vm_id)
                    break
                except UpstreamError as error:
                    failures += 1
                    self._store.undo[vm_id]["last_error"] = str(error)
                    refused = bool(self._fly.trouble)  # which has a log line of its own
                    log_event("undo_retry", level=logging.DEBUG if refused else logging.WARNING, vm_id=vm_id, error=str(error), attempt=failures + 1)
                    await self._clock.sleep(self._clock.uniform(0, min(REFUSED_CAP_S if refused else UNDO_CAP_S, 0.5 * 2 ** min(failures, 10))))
            del self._store.undo[vm_id]
            self.gone[vm_id] = self._clock.monotonic()
            while len(self.gone) > 10_000:
                self.gone.popitem(last=False)
            log_event("undo_confirmed", vm_id=vm_id)
            with contextlib.suppress(StoreError):
                await self._store.commit()
        finally:
            del self._undoing[vm_id]

    def _is_fresh(self, vm_id: str) -> bool:
        """Whether a 404 may mean `not yet`: the app is young, or a create that was cut off may still take effect."""
        created = str(self._store.undo[vm_id].get("created_at") or "")
        return created > timestamp(self._clock.now() - 2 * FRESH_APP_S)

    async def _delete_and_confirm(self, vm_id: str) -> bool:
        """Whether there was an app to delete; returns when it is gone."""
        was_there = await self._fly.delete_app(vm_id)
        for _ in range(30):
            try:
                await self._fly.get_app(vm_id)
            except UpstreamNotFound:
                return was_there
            await self._clock.sleep(self._clock.uniform(0.1, 1.0))
        raise UpstreamUnavailable("fly", "delete app", words="the app is still there")

    async def discard(self, vm_id: str) -> None:
        """Destroy an app of ours that nobody has a route to."""
        self._store.undo[vm_id] = {"vm_id": vm_id, "reason": "orphan"}
        with contextlib.suppress(StoreError):
            await self._store.commit()
        self._start_undo(vm_id)

    async def discard_pooled(self, vm_id: str, why: str) -> None:
        """Destroy an entry of the pool, unless somebody has claimed it meanwhile."""
        if (entry := self._store.pool.pop(vm_id, None)) is not None:
            log_event("pool_discarded", vm_id=vm_id, why=why)
            self._store.undo[vm_id] = entry | {"reason": "orphan"}
            with contextlib.suppress(StoreError):
                await self._store.commit()
            self._start_undo(vm_id)

    async def tear_down(self, vm_id: str) -> bool:
        """Destroy a VM in whatever state it is and forget its route; False when Fly has not confirmed in 25 s. Raises Refusal when unknown."""
        found = self._store.find(vm_id)
        log_event("teardown", vm_id=vm_id)
        if job := self.jobs.get(vm_id):
            await self._cancel(job)
        elif found:
            self._store.begin_undo(found[0], "torn_down")
            with contextlib.suppress(StoreError):  # a full disk must not keep a VM alive; the write is tried on
                await self._store.commit()
            await self._on_gone(vm_id, "torn_down")  # not before it is on disk: after a kill the VM would live on, its texts dropped
            self._start_undo(vm_id)
        elif vm_id not in self._store.undo:
            if self.failed.pop(vm_id, None) is None:
                raise Refusal("unknown_vm", f"there is no VM {vm_id}")
            return True
        if vm_id not in self._store.undo:
            self.failed.pop(vm_id, None)
            return True
        with contextlib.suppress(TimeoutError):
            async with time_limit(self._clock, TEARDOWN_WAIT_S):
                await asyncio.shield(self._start_undo(vm_id))
                self.failed.pop(vm_id, None)
                return True
        return False

    async def _cancel(self, job: Job) -> None:
        assert job.task is not None
        job.torn_down = True
        job.task.cancel()
        with contextlib.suppress(Refusal, asyncio.CancelledError):
            await asyncio.shield(job.task)
        if self._store.find(job.vm_id):  # cancelled before its first step, or while its failure was looked into
            await self._abandon(job, Refusal("torn_down", f"{job.vm_id} was deleted before it was set up"))

    # Start and stop

    async def recover(self) -> None:
        """At start: undo what an earlier process left unfinished."""
        for phone, route in list(self._store.routes.items()):
            if route.state in ("provisioning", "deleting"):
                self._store.begin_undo(phone, "failed" if route.state == "provisioning" else "torn_down")
                await self._on_gone(route.vm_id, "failed" if route.state == "provisioning" else "torn_down")
                log_event("unfinished_undone", level=logging.WARNING, vm_id=route.vm_id, was=route.state)
        if self._store.undo or self._store.is_new:
            with contextlib.suppress(StoreError):
                await self._store.commit()
        for vm_id in list(self._store.undo):
            self._start_undo(vm_id)

    async def drain(self) -> None:
        """Take no more orders; wait for those under way (the caller bounds the wait)."""
        self.draining = True
        if tasks := [job.task for job in self.jobs.values() if job.task]:
            await asyncio.wait(tasks)

    # Telling

    def describe(self, phone: str, route: Route) -> Json:
        """The VM record."""
        steps = {"steps": route.extra["steps"], "from_pool": bool(route.extra.get("from_pool"))} if "steps" in route.extra else {}  # known once it is ready
        return {"vm_id": route.vm_id, "machine_id": route.machine_id or None, "vm_url": route.vm_url or None, "phone_number": phone, "region": route.region or None,
                "image": route.image or None, "state": route.state, "step": route.step or None, "created_at": route.created_at or None, "last_error": route.last_error or None} | steps

    def look_up(self, vm_id: str) -> Json:
        """The record of a VM that is routed, being deleted, or failed within the hour; raises Refusal."""
        if found := self._store.find(vm_id):
            return self.describe(*found)
        vm_id = next((known for known, entry in self._store.undo.items() if entry.get("machine_id") == vm_id), vm_id)
        if (failed := self.failed.get(vm_id)) and failed[0] > self._clock.monotonic() - FAILED_KEPT_S:
            return failed[1]
        if entry := self._store.undo.get(vm_id):
            known = {name: value for name, value in entry.items() if isinstance(value, str)}
            record = self.describe(str(entry.get("phone_number") or ""), Route.from_json(known | {"vm_id": vm_id}))
            return record | {"state": "failed" if entry.get("reason") == "failed" else "deleting"}
        raise Refusal("unknown_vm", f"there is no VM {vm_id}")


class Pool:
    """Keeps POOL_SIZE machines ready that never ran: image on the host, not booted, so that a user's first boot takes seconds and is the machine's own first."""

    AT_ONCE = 3
    LOOK_S = 60.0

    def __init__(self, settings: Settings, clock: Clock, store: RouteStore, fly: FlyClient, provisioner: Provisioner) -> None:
        self._settings, self._clock, self._store, self._fly, self._provisioner = settings, clock, store, fly, provisioner

    async def run(self) -> None:
        """Fill, and look through it every minute and at every claim; when Fly is full or away, wait up to 5 minutes."""
        for vm_id, entry in list(self._store.pool.items()):
            if entry.get("state") != "ready":
                await self._provisioner.discard_pooled(vm_id, "an earlier process was making it")
        failures, changed = 0, self._provisioner.pool_changed
        while True:
            changed.clear()
            await self._sort()
            missing = min(self._settings.pool_size - len(self._store.pool), self.AT_ONCE)
            made = await asyncio.gather(*(self._fill() for _ in range(missing))) if not self._provisioner.closed else []
            failures = 0 if all(made) else failures + 1
            if failures:
                await self._clock.sleep(self._clock.uniform(1, min(300.0, 5 * 2.0 ** min(failures, 10))))
            elif not made:
                with contextlib.suppress(TimeoutError):
                    async with time_limit(self._clock, self.LOOK_S):
                        await changed.wait()

    async def _sort(self) -> None:
        """Destroy what does not fit any more or is not at rest, forget what vanished."""
        kept = 0
        for vm_id, entry in list(self._store.pool.items()):
            if entry.get("state") != "ready":
                continue
            if kept >= self._settings.pool_size or entry.get("shape") != pool_shape(self._settings):
                await self._provisioner.discard_pooled(vm_id, "not wanted any more")
                continue
            kept += 1
            try:
                machine = await self._fly.get_machine(vm_id, str(entry.get("machine_id")))
            except UpstreamNotFound:
                await self._provisioner.discard_pooled(vm_id, "Fly does not know it")
            except UpstreamError as error:
                log_event("pool_not_seen", level=logging.WARNING, vm_id=vm_id, error=str(error))
            else:
                if machine.state not in POOL_STATES or not machine.host_ok:
                    await self._provisioner.discard_pooled(vm_id, f"it is {machine.state}" if machine.host_ok else "its host is not well")

    async def _fill(self) -> bool:
        """Make one machine, recorded before each call like any other; whether it is ready now."""
        job = self._provisioner.new_job(Order(phone="", credentials={}))
        self._store.pool[job.vm_id] = replace(self._provisioner.blank(job), state="filling", extra={"shape": pool_shape(self._settings)}).to_json()
        try:
            async with time_limit(self._clock, self._settings.provision_timeout_s):
                await self._store.commit()
                await self._provisioner.take(job, self._provisioner.into_pool)
            self._store.pool[job.vm_id] |= {"state": "ready", "step": ""}
            await self._store.commit()
        except Exception as error:  # also one that nobody foresaw must not end the filling
            log_event("pool_not_filled", level=logging.WARNING, vm_id=job.vm_id, step=job.step, error=str(error) or type(error).__name__)
            if not job.step or isinstance(error, NameTaken):
                self._store.pool.pop(job.vm_id, None)
            await self._provisioner.discard_pooled(job.vm_id, "was not finished")
            return False
        log_event("pool_filled", vm_id=job.vm_id, region=self._store.pool.get(job.vm_id, {}).get("region"))
        return True


# --- Relay ---

SEEN_S, SEEN_LEAST, SEEN_MOST = 86_400.0, 20_000, 1_000_000
BUSY_LIMIT_S = 1800.0
ASK_FLY_EVERY_S = 15.0
UNKNOWN_NOTICE_S = 3600.0
LINK_S = 86_400.0
LIST_OVERLAP_S = 900.0
LOOP_GUARD_S = 30.0  # 14107: Twilio counts texts that follow each other within this time
HOMELESS_S = 3600.0  # how long messages of a VM without a route are kept: Fly may yet tell whose it is
STILL_AFTER_S, STILL_EVERY_S, STILL_MOST = 60.0, 300.0, 6
UNASKED_LIMITS = ((60.0, 20), (86_400.0, 300))  # a VM's own messages: seconds, how many
# Twilio acts on these by itself when they are the whole of a text; YES is an answer to an agent unless its sender is opted out.
KEYWORDS = {**dict.fromkeys(("STOP", "STOPALL", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT"), "STOP"),
            **dict.fromkeys(("START", "UNSTOP", "YES"), "START"), **dict.fromkeys(("HELP", "INFO"), "HELP")}
# Callbacks come in any order: a status of no higher rank than one already told says nothing new.
RANKS = {"accepted": 0, "scheduled": 0, "queued": 1, "sending": 2, "sent": 3, "delivered": 4, "undelivered": 4, "failed": 4, "canceled": 4, "read": 5}
IMAGE_IN_WORDS = "An image that could not be sent as a picture message; for a day it is here: {url}"
NOTICES = {
    "N1": "This number has no cockpit VM yet. Sign up: {url}",
    "N2": "Your VM is being set up. Your text is kept.",
    "N3": 'Your queue is full ({n} waiting). This text was not kept: "{text}"',
    "N4": "More than {n} texts a minute. This text was not kept; wait a minute.",
    "N5": "Your VM is restarting... Your text is kept and will run when it is back.",
    "N6": "Not run, your VM was away too long: {texts}",
    "N7": 'Your VM went away twice while running this; not tried again: "{text}"',
    "N8": 'No answer after {s} s; it may still be running: "{text}"',
    "N9": 'Your VM answered with an error ({status}): "{text}"',
    "N10": "Done, no output.",
    "N10 exit": "Exit code {n}, no output.",
    "N11": "Your VM's answer could not be read.",
    "N12": "Your VM is gone. Not run: {texts}",
    "N13": "Your VM could not be set up. Not run: {texts}",
    "N14": "Your VM is ready. Text me anything.",
    "N15": "Still working on it.",
}


TRACES_KEPT = 10_000
LOG_GATHER_S = 0.05


@dataclass(slots=True, kw_only=True, eq=False)
class Trace:
    """One text's way through the gateway, without its words; steps in seconds since its receipt, None while not reached."""

    sid: str = ""
    vm_id: str = ""
    request_id: str = ""
    received: float = 0.0  # wall clock
    began: float = 0.0  # monotonic, the same moment
    outcome: str = "waiting"
    journaled: float | None = None
    handed_over: float | None = None
    answered: float | None = None
    sent: float | None = None
    delivered: float | None = None
    attempts: int = 0
    parts: int = 0
    errors: list[tuple[float, str]] | None = None

    def to_json(self) -> Json:
        steps = [("received", 0.0), *((name, getattr(self, name)) for name in ("journaled", "handed_over", "answered", "sent", "delivered"))]
        return {"message_sid": self.sid, "vm_id": self.vm_id or None, "request_id": self.request_id or None, "outcome": self.outcome, "attempts": self.attempts, "parts": self.parts,
                "steps": [{"step": name, "at": self._at(passed), "ms": round(passed * 1000, 1)} for name, passed in steps if passed is not None],
                "errors": [{"at": self._at(passed), "error": words} for passed, words in self.errors or ()]}

    def _at(self, passed: float) -> str:
        return rfc3339(self.received + passed)


VERB = re.compile(r"\s*cockpit (status|restart|queue|cancel|help)\s*", re.IGNORECASE)
VERBS_HELP = """cockpit status: how your VM is
cockpit restart: restart it
cockpit queue: what runs and waits
cockpit cancel: drop what waits
Anything else goes to your VM."""


@dataclass(slots=True, kw_only=True, eq=False)
class Text:
    """An accepted text on its way to its VM. Wall-clock seconds: they must survive a restart."""

    sid: str
    body: str
    arrived: float
    since: float = 0.0  # when it arrived, by `Relay.steady_now`
    channel: str = ""  # "whatsapp:" or nothing
    ours: str = ""  # the address it was sent to, from which it is answered
    media: tuple[tuple[str, str], ...] = ()
    run_noted: bool = False  # the journal says it was handed over
    reached: bool = False  # it perhaps reached the VM
    cut_at: float = 0.0
    cuts: int = 0
    busy_since: float | None = None  # monotonic
    attempts: int = 0
    trace: Trace = field(default_factory=Trace)


@dataclass(slots=True, kw_only=True, eq=False)
class Outbound:
    """Something to tell an owner: words in parts, then images of the VM, each a message of its own."""

    id: str
    parts: list[str]
    at: float
    images: tuple[str, ...] = ()
    channel: str = ""
    ours: str = ""
    sent: int = 0  # of the parts, then of the images
    in_words: list[int] = field(default_factory=list)  # which of them go as words and a link: they were refused as pictures
    once_more: bool = False  # Twilio stopped it before: there is no third time
    hold_until: float = 0.0  # wall clock: its lane sends nothing before
    resumed: bool = False  # an earlier process may have sent it
    traces: Sequence[Trace] = ()  # of the texts it answers


@dataclass(slots=True, kw_only=True, eq=False)
class Lane:
    """What is on its way to and from one VM: a run lane and a send lane, both in order."""

    vm_id: str
    phone: str
    waiting: deque[Text] = field(default_factory=deque)  # the first one is being run
    outbox: deque[Outbound] = field(default_factory=deque)
    accepting: int = 0
    runner: asyncio.Task[None] | None = None
    sender: asyncio.Task[None] | None = None
    handing_over: bool = False
    handed_at: float = 0.0  # monotonic
    alive_at: float = 0.0  # wall clock: the VM's last sign of life on /command
    probes: int = 0
    asked_fly_at: float = float("-inf")  # monotonic
    waker: asyncio.Task[None] | None = None
    busy_noted_at: float = 0.0
    told_setup: bool = False
    hold_until: float = 0.0  # wall clock: Twilio's loop guard wants a pause
    still_at: float = 0.0  # monotonic: when its owner hears that the command still runs
    still_told: int = 0
    gone: str = ""  # the notice that whoever waits here gets, once the VM is no more

    def is_idle(self) -> bool:
        return not (self.waiting or self.outbox or self.accepting or self.runner or self.sender)


class Memory:
    """What outlives the messages themselves: SIDs seen and what was said to them, outages told, opt-outs, the addresses last used."""

    def __init__(self) -> None:
        self.seen: OrderedDict[str, float] = OrderedDict()
        self.said: dict[str, str] = {}
        self.away: dict[str, float] = {}  # vm_id: since when
        self.mark = 0.0  # up to when Twilio's list was read
        self.muted: dict[str, bool] = {}  # channel and vm_id of those who opted out
        self.opted: OrderedDict[str, float] = OrderedDict()  # when they last said STOP or START
        self.pairs: dict[str, Json] = {}  # vm_id: channel and our address of its owner's last text, where they are not the usual ones
        self.unasked: dict[str, deque[float]] = {}  # vm_id: when it last texted its owner by itself
        self.errors: OrderedDict[str, str] = OrderedDict()  # vm_id: why its owner did not hear something

    def remember(self, sid: str, at: float, say: str = "") -> None:
        """SIDs are kept for 24 h, at least 20,000 and at most 1,000,000 of them."""
        self.seen[sid] = at
        if say:
            self.said[sid] = say
        while len(self.seen) > SEEN_LEAST:
            oldest = next(iter(self.seen))
            if len(self.seen) <= SEEN_MOST and self.seen[oldest] > at - SEEN_S:
                break
            self.said.pop(oldest, None)
            self.mark = max(self.mark, self.seen.pop(oldest) + LIST_OVERLAP_S)  # what is forgotten is not to be fetched again

    def line(self) -> Iterable[bytes]:
        """All of it as one line of the journal, whose SIDs are put into words only as they are written: a million at once would take a second."""
        rest = {"k": "state", "said": self.said, "away": self.away, "muted": self.muted, "opted": self.opted, "pairs": self.pairs,
                "unasked": {vm_id: list(times) for vm_id, times in self.unasked.items()}, "errors": self.errors, "mark": self.mark}
        head, sids, times = dump_tight(rest)[:-1].encode(), list(self.seen), list(self.seen.values())

        def pieces() -> Iterable[bytes]:
            yield head + b',"seen":['
            for start in range(0, len(sids), 1000):
                some = [[sid, int(at)] for sid, at in zip(sids[start:start + 1000], times[start:start + 1000], strict=True)]
                yield (b"," if start else b"") + dump_tight(some)[1:-1].encode()
            yield b"]}\n"
        return pieces()

    def restore(self, record: Json) -> None:
        self.seen.update((sid, at) for sid, at in record.get("seen", ()))
        self.said.update(record.get("said", {}))
        self.mark = max(self.mark, float(record.get("mark", 0)))
        for name in ("away", "muted", "opted", "pairs", "errors"):
            getattr(self, name).update(record.get(name, {}))
        for vm_id, times in record.get("unasked", {}).items():
            self.unasked[vm_id] = deque(times, maxlen=UNASKED_LIMITS[-1][1])

    def use_pair(self, vm_id: str, pair: Json) -> None:
        """The channel and our address of an owner's last text; nothing is kept of the usual ones."""
        if pair:
            self.pairs[vm_id] = pair
        elif vm_id in self.pairs:
            del self.pairs[vm_id]

    def spoke(self, vm_id: str, at: float) -> None:
        """A VM texted its owner unasked."""
        self.unasked.setdefault(vm_id, deque(maxlen=UNASKED_LIMITS[-1][1])).append(at)

    def mute(self, who: str, muted: bool, at: float) -> None:
        """Nobody who opted out is texted until they text START."""
        self.opted[who] = at
        self.opted.move_to_end(who)
        if len(self.opted) > 10_000:
            self.opted.popitem(last=False)
        if muted:
            self.muted[who] = True
        else:
            self.muted.pop(who, None)

    def note_error(self, vm_id: str, words: str) -> None:
        """Remember what is wrong with reaching a VM's owner; no words: nothing is."""
        self.errors.pop(vm_id, None)
        if words:
            self.errors[vm_id] = words
        while len(self.errors) > 10_000:
            self.errors.popitem(last=False)

    def forget(self, vm_id: str) -> None:
        """A VM is gone (that its owner opted out stays true)."""
        for kept in (self.away, self.pairs, self.unasked, self.errors):
            kept.pop(vm_id, None)

    def forget_gone(self, is_known: Callable[[str], object]) -> None:
        """After a replay: the journal's older lines tell of VMs that are gone since."""
        for vm_id in {*self.away, *self.pairs, *self.unasked, *self.errors}:
            if not is_known(vm_id):
                self.forget(vm_id)


class Relay:
    """Carries texts to VMs and answers back: journaled before they are acknowledged, in order per phone, phones in parallel.

    Journal records (key `k`), none with a phone number: `in` a text accepted (`run`: and handed over), `run` handed over, `held` surely not
    handed over, `cut` its connection broke, `busy` the VM said 409, `out` something to tell, completing the texts `re` (`unheard`: without
    a word of the VM; `away`: it opens an outage), `sent` parts Twilio took, `words` an image that was refused as a picture, `done` given
    up, `seen` a text refused, `mute` an owner opted out or in, `error` what is wrong with reaching one, `claimed` SIDs of what was sent,
    `mark` Twilio's list was read, `back` an outage over, `state` all that is remembered.
    """

    def __init__(self, settings: Settings, clock: Clock, store: RouteStore, journal: Journal, vms: VmClient, twilio: TwilioClient, owner: Owner,
                 metrics: Metrics, *, wake: Callable[[str, str], Awaitable[None]], restart: Callable[[str], object]) -> None:
        self._settings, self._clock, self._store, self._journal = settings, clock, store, journal
        self._vms, self._twilio, self._owner, self._metrics, self._wake, self._restart = vms, twilio, owner, metrics, wake, restart
        self.memory, self._began, self._wall_ahead = Memory(), clock.now(), clock.now() - clock.monotonic()
        self.lanes: dict[str, Lane] = {}
        self._queued_at_mark = -1
        self._homeless: dict[str, Lane] = {}  # what the journal held for VMs that have no route (yet)
        self._accepting: dict[str, asyncio.Future[str]] = {}
        self._told_unknown: OrderedDict[str, float] = OrderedDict()
        self._recent: OrderedDict[str, deque[float]] = OrderedDict()
        self._told_fast: dict[str, float] = {}
        self._failing: set[str] = set()  # VMs whose last call failed
        self._perhaps_running: dict[str, float] = {}  # vm_id: when its last command was handed over whose answer is missing (monotonic)
        self.closed = ""  # why nobody can be called unknown now
        self._held: set[str] = set()  # VMs that are handed nothing: they are being changed
        self.last_errors = self.memory.errors
        self._ranks: OrderedDict[str, int] = OrderedDict()  # of the last status told of a message; a restart may count one twice
        self._sent_as: OrderedDict[str, Sequence[Trace]] = OrderedDict()  # by the SID of an answer's message, for the word that it was delivered
        self._watcher: asyncio.Task[None] | None = None
        # A VM's links and callbacks are of use only where Twilio can reach them.
        self._callback = "" if is_loopback(urlsplit(settings.public_url).hostname or "") else f"{settings.public_url}/sms/status?vm="
        self.draining = False
        self.traces: OrderedDict[str, Trace] = OrderedDict()
        self._done: list[Trace] = []  # to be logged
        self.last_texts: dict[str, float] = {}  # vm_id: when its last text came, wall clock
        journal.snapshot, journal.is_idle = self._snapshot, lambda: not self.lanes

    # Taking texts in

    async def accept(self, message: InboundMessage) -> str:
        """Take a text in, once; returns the words of the webhook's answer. Raises StoreError when it cannot be journaled."""
        if message.sid in self.memory.seen:
            self._metrics.texts.add("repeated")
            return self.memory.said.get(message.sid, "")
        if (first := self._accepting.get(message.sid)) is not None:
            return await asyncio.shield(first)
        if self.draining:
            raise Refusal("draining", "this gateway is shutting down; the text will be fetched from Twilio's list")
        verdict = self._accepting[message.sid] = asyncio.get_running_loop().create_future()
        try:
            say = await self._take(message)
            verdict.set_result(say)
            return say
        except BaseException as error:
            verdict.set_exception(error if isinstance(error, CockpitError) else StoreError("not journaled"))
            verdict.exception()  # whoever waits sees it; if nobody does, that is no accident
            raise
        finally:
            del self._accepting[message.sid]

    def _trace(self, sid: str, vm_id: str, received: float) -> Trace:
        trace = self.traces[sid] = Trace(sid=sid, vm_id=vm_id, request_id=REQUEST_ID.get(), received=received,
                                         began=self._clock.monotonic() - max(0.0, self._clock.now() - received))
        if len(self.traces) > TRACES_KEPT:
            self.traces.popitem(last=False)
        return trace

    def _turn_away(self, message: InboundMessage, outcome: str) -> None:
        self._metrics.texts.add(outcome)
        self._trace(message.sid, "", self._clock.now()).outcome = outcome
        log_event("text_refused", message_sid=message.sid, phone=mask_phone(message.sender), outcome=outcome)

    async def _take(self, message: InboundMessage) -> str:
        channel, phone = ("whatsapp:", message.sender[9:]) if message.sender.startswith("whatsapp:") else ("", message.sender)
        route = self._store.routes.get(phone)
        who = channel + route.vm_id if route else ""
        if word := self._keyword(message, who):
            return await self._take_keyword(message, who, word)
        verb = VERB.fullmatch(message.body) if route else None
        refusal = (None if message.fetched else self._limit(message, phone)) if verb else self._refuse(message, phone, route)
        if route is None and self.closed:
            raise Refusal("fly_unavailable", self.closed)  # not taken, so that it is fetched from Twilio's list later
        if refusal is not None or route is None:
            say = "" if who in self.memory.muted else refusal or ""
            await self._journal.append({"k": "seen", "sid": message.sid, "at": int(message.arrived)} | ({"say": say} if say else {}))
            self.memory.remember(message.sid, message.arrived, say)
            return say
        if verb:
            return await self._take_verb(message, channel, phone, verb[1].lower())
        lane = self._lane(route.vm_id, phone)
        trace = self._trace(message.sid, route.vm_id, message.arrived)
        text = Text(sid=message.sid, body=message.body, arrived=message.arrived, channel=channel, ours=message.recipient, media=message.media, trace=trace, since=self._since(message.arrived))
        # When nothing is before it the hand-over follows at once, so one line, one fsync, tells both.
        text.run_noted = route.state == "ready" and lane.is_idle() and route.vm_id not in self.memory.away and route.vm_id not in self._held
        lane.accepting += 1
        try:
            await self._journal.append(self._in_record(lane, text))
        except StoreError:
            self._metrics.texts.add("not_journaled")
            raise
        finally:
            lane.accepting -= 1
            self._retire(lane)
        self.memory.remember(message.sid, message.arrived)
        self.memory.use_pair(lane.vm_id, self._addresses(channel, message.recipient))
        trace.journaled = self._clock.monotonic() - trace.began
        self.last_texts[lane.vm_id] = message.arrived
        self._metrics.texts.add("accepted")
        self._metrics.note_text()
        await self._enqueue(lane, text, route)
        return ""

    def _keyword(self, message: InboundMessage, who: str) -> str:
        """STOP, START or HELP when Twilio answers this text itself, else nothing."""
        word = message.body.strip().upper() if len(message.body) < 40 else ""
        if word == "YES" and who not in self.memory.muted:
            return ""
        return KEYWORDS.get(message.opt_out.upper()) or KEYWORDS.get(word, "")

    async def _take_keyword(self, message: InboundMessage, who: str, word: str) -> str:
        """Record an opt-out or opt-in; nothing is said, Twilio does that."""
        record: Json = {"k": "seen", "sid": message.sid, "at": message.arrived}
        # What the list tells late does not undo what was said since.
        if who and word != "HELP" and not (message.fetched and message.arrived < self.memory.opted.get(who, 0.0)):
            record |= {"who": who, "muted": word == "STOP"}
        await self._journal.append(record)
        self.memory.remember(message.sid, message.arrived)
        if "who" in record:
            self.memory.mute(who, record["muted"], message.arrived)
            if word == "START":
                self._remember_error(who.removeprefix("whatsapp:"), "")
            log_event("opted_out" if word == "STOP" else "opted_in", vm_id=who, message_sid=message.sid)
        self._metrics.texts.add("keyword")
        return ""

    async def _take_verb(self, message: InboundMessage, channel: str, phone: str, verb: str) -> str:
        """The gateway's own verbs: answered at once and past the run lane, so that they work with the VM dead."""
        await self._journal.append({"k": "seen", "sid": message.sid, "at": int(message.arrived)})
        self.memory.remember(message.sid, message.arrived)
        self._metrics.texts.add("verb")
        if (route := self._store.routes.get(phone)) is None:  # torn down meanwhile
            return ""
        lane = self._lane(route.vm_id, phone)
        self.memory.use_pair(lane.vm_id, self._addresses(channel, message.recipient))
        running = lane.waiting[0] if lane.waiting and lane.handing_over else None
        waiting = [text for text in lane.waiting if text is not running]
        log_event("verb", vm_id=lane.vm_id, message_sid=message.sid, verb=verb)
        if verb == "cancel" and waiting:
            # At once, so that none of them is handed over while the journal writes; what runs, runs on.
            lane.waiting = deque([running] if running else [])
            await self._finish(lane, waiting, [f"Not run: {len(waiting)} texts dropped." if len(waiting) > 1 else "Not run: 1 text dropped."], "cancelled")
            return ""
        now = f'Running: "{quoted(running.body)}"' if running else "Nothing is running."
        if verb == "queue":
            words = "\n".join([now, *(f'{place}. "{quoted(text.body)}"' for place, text in enumerate(waiting, 1))])
        elif verb == "restart":
            words = self._restart_by_verb(route)
        else:
            words = {"help": VERBS_HELP, "cancel": f"Nothing is waiting. {now}", "status": f"{self._condition(route)} {now} {len(waiting)} waiting."}[verb]
        await self._tell(lane, words)
        return ""

    def _restart_by_verb(self, route: Route) -> str:
        try:
            self._restart(route.vm_id)
        except Refusal as refusal:
            return f"Not restarted: {refusal.detail}"
        return "Your VM is being restarted. What waits will run when it is back."

    def _condition(self, route: Route) -> str:
        """How a VM is, in words for its owner."""
        if route.state != "ready":
            return {"provisioning": f"Your VM is being set up ({route.step or 'begun'}).", "failed": "Your VM is gone."}.get(route.state, f"Your VM is {route.state}.")
        if route.vm_id in self._held:
            return "Your VM is being restarted."
        if (since := self.memory.away.get(route.vm_id)) is not None:
            return f"Your VM has been away for {max(0, int(self._clock.now() - since))} s."
        return "Your VM is ready."

    async def _enqueue(self, lane: Lane, text: Text, route: Route) -> None:
        if lane.gone:
            await self._finish(lane, [text], [self._quote(lane.gone, [text])], "gone")
            return
        self.lanes[lane.vm_id] = lane
        lane.waiting.append(text)
        self._start_running(lane)
        if route.state == "provisioning" and not lane.told_setup:
            lane.told_setup = True
            self._owner.start(self._tell(lane, NOTICES["N2"], text), "tell N2")

    def _refuse(self, message: InboundMessage, phone: str, route: Route | None) -> str | None:
        """What to say to a text that is not taken; None when it is."""
        if route is None:
            if not PHONE.fullmatch(phone) or phone == self._settings.twilio_phone_number:
                self._turn_away(message, "ignored")
                return ""
            self._turn_away(message, "unknown")
            return self._invite(phone)
        if route.state == "failed":
            self._turn_away(message, "gone")
            return self._quote("N12", [message])
        lane = self.lanes.get(route.vm_id)
        waiting = max(0, len(lane.waiting) + lane.accepting - (lane.runner is not None and route.state != "provisioning")) if lane else 0
        if waiting >= self._settings.queue_limit:
            self._turn_away(message, "queue_full")
            return NOTICES["N3"].format(n=waiting, text=quoted(message.body))
        return None if message.fetched else self._limit(message, phone)

    def _invite(self, phone: str) -> str:
        now = self._clock.monotonic()
        if not self._settings.onboarding_url or self._told_unknown.get(phone, float("-inf")) > now - UNKNOWN_NOTICE_S:
            return ""
        self._told_unknown[phone] = now
        self._told_unknown.move_to_end(phone)
        while len(self._told_unknown) > 10_000:
            self._told_unknown.popitem(last=False)
        return NOTICES["N1"].format(url=self._settings.onboarding_url)

    def _limit(self, message: InboundMessage, phone: str) -> str | None:
        """TEXT_LIMIT within any minute; the notice once a minute."""
        limit, now = self._settings.text_limit, self._clock.monotonic()
        if not limit:
            return None
        times = self._recent.setdefault(phone, deque(maxlen=limit))
        self._recent.move_to_end(phone)
        if len(times) < limit or times[0] <= now - 60:
            times.append(now)
            if len(self._recent) > 10_000:
                oldest, _ = self._recent.popitem(last=False)
                self._told_fast.pop(oldest, None)
            return None
        self._turn_away(message, "too_fast")
        if self._told_fast.get(phone, float("-inf")) > now - 60:
            return ""
        self._told_fast[phone] = now
        return NOTICES["N4"].format(n=limit)

    def _quote(self, notice: str, texts: Sequence[Text | InboundMessage]) -> str:
        """A notice about texts that were not run; those that end together share it."""
        words = NOTICES[notice].format(texts=", ".join(f'"{quoted(text.body)}"' for text in texts)) if texts else NOTICES[notice].partition(" Not run")[0]
        if notice == "N12" and self._settings.onboarding_url:
            words += f" Sign up: {self._settings.onboarding_url}"
        return words

    # Lanes

    def _lane(self, vm_id: str, phone: str) -> Lane:
        lane = self.lanes.get(vm_id)
        if lane is None:
            lane = self.lanes[vm_id] = Lane(vm_id=vm_id, phone=phone)
        return lane

    def _retire(self, lane: Lane) -> None:
        if lane.is_idle() and self.lanes.get(lane.vm_id) is lane:
            del self.lanes[lane.vm_id]
            if not self.lanes:
                self._journal.tidy()

    def _start_running(self, lane: Lane) -> None:
        if lane.runner is None and not self.draining and not lane.gone:
            lane.runner = self._owner.start(self._run(lane))

    def _start_sending(self, lane: Lane) -> None:
        # A run lane with nothing more to run goes on as the send lane: one task less per text.
        if lane.sender is None and not (lane.handing_over and not lane.waiting):
            lane.sender = self._owner.start(self._send(lane))

    # Running

    async def _run(self, lane: Lane) -> None:
        """The run lane: one text at a time, in order; ends when nothing waits (no await between that look and its end)."""
        REQUEST_ID.set("")  # it outlives the request that happened to start it
        try:
            while lane.waiting and not self.draining:
                route = self._store.routes.get(lane.phone)
                if route is None or route.vm_id != lane.vm_id or route.state == "provisioning" or lane.vm_id in self._held:
                    return
                await self._hand_over(lane, route, lane.waiting[0])
            lane.runner = None
            if lane.outbox and lane.sender is None:
                lane.sender = asyncio.current_task()
                await self._send(lane)
        finally:
            if lane.runner is asyncio.current_task():
                lane.runner = None
            if lane.outbox:
                self._start_sending(lane)
            self._retire(lane)

    async def _hand_over(self, lane: Lane, route: Route, text: Text) -> None:
        """One attempt to run the first text, or one wait for the VM's return."""
        if text.cuts >= 2:
            await self._finish(lane, [text], [NOTICES["N7"].format(text=quoted(text.body))], "crashed")
            return
        if not text.attempts and self._is_expired(lane, text):
            await self._expire(lane)
            return
        if not await self._is_open(lane, route, text):
            return
        self._start_watching(lane)
        lane.handed_at = self._clock.monotonic()
        text.attempts += 1
        self._note_hand_over(text.trace)
        try:
            answer = await self._vms.command(route, text.sid, text.body, self._media(lane.vm_id, text))
        except VmAway as error:
            await self._goes_away(lane, text, error)
        except VmBusy:
            await self._wait_while_busy(lane, text)
        except VmSilent:
            self._failing.add(lane.vm_id)
            await self._finish(lane, [text], [NOTICES["N8"].format(s=f"{self._settings.vm_command_timeout_s:g}", text=quoted(text.body))], "silent")
        except VmFailed as error:
            self._sign_of_life(lane, ends_outage=error.status < 500)
            await self._finish(lane, [text], [NOTICES["N9"].format(status=error.status, text=quoted(text.body))], "failed")
        else:
            self._sign_of_life(lane)
            await self._finish(lane, [text], words_of(answer), "answered", answer.images)
        finally:
            lane.handing_over = False

    async def _is_open(self, lane: Lane, route: Route, text: Text) -> bool:
        """Whether the first text may go now: its VM is back, and the journal says that it goes."""
        if lane.vm_id in self.memory.away and not await self._returns(lane, route, text):
            return False
        if not text.run_noted:
            text.run_noted = True
            await self._on_disk({"k": "run", "sid": text.sid})
        # A VM that was changed while this waited is looked at again; the text may have been cancelled.
        return lane.vm_id not in self._held and self._store.routes.get(lane.phone) is route and bool(lane.waiting) and lane.waiting[0] is text

    def _note_hand_over(self, trace: Trace) -> None:
        trace.attempts += 1
        if trace.handed_over is None:
            trace.handed_over = self._clock.monotonic() - trace.began
            self._metrics.text_handover.observe(trace.handed_over)

    def _note_error(self, trace: Trace, words: str) -> None:
        trace.errors = [*(trace.errors or ())[-9:], (self._clock.monotonic() - trace.began, words)]

    def _media(self, vm_id: str, text: Text) -> list[Json]:
        """Links by which the VM can open a text's pictures; only what lies at Twilio's own address gets one."""
        origin = self._settings.twilio_url
        return [{"url": self._link(vm_id, url.removeprefix(origin), self._clock.now()), "content_type": kind} for url, kind in text.media if url.startswith(origin + "/")]

    def _link(self, vm_id: str, what: str, since: float) -> str:
        return f"{self._settings.public_url}/media/{sign_link(self._settings.secrets[0], vm_id, what, since + LINK_S)}"

    def _start_watching(self, lane: Lane) -> None:
        lane.handing_over, lane.still_at, lane.still_told = True, self._clock.monotonic() + STILL_AFTER_S, 0
        if self._watcher is None and self._settings.vm_command_timeout_s > STILL_AFTER_S:
            self._watcher = self._owner.start(self._watch())

    async def _watch(self) -> None:
        """Tell the owners of commands that run long (N15), for all lanes; ends when nothing runs."""
        try:
            while times := [lane.still_at for lane in self.lanes.values() if lane.handing_over]:
                await self._clock.sleep(min(STILL_AFTER_S, max(1.0, min(times) - self._clock.monotonic())))
                for lane in list(self.lanes.values()):
                    # Behind anything still to be sent it would only come late.
                    if lane.handing_over and lane.still_at <= self._clock.monotonic() and not lane.outbox and lane.waiting:
                        lane.still_told += 1
                        lane.still_at += STILL_EVERY_S if lane.still_told < STILL_MOST else float("inf")
                        await self._tell(lane, NOTICES["N15"], lane.waiting[0])
        finally:
            self._watcher = None

    def _sign_of_life(self, lane: Lane, *, ends_outage: bool = True) -> None:
        """The VM answered on /command: from now on what is behind it waits; below 500 that ends an outage."""
        lane.alive_at, lane.probes = self.steady_now(), 0
        if not ends_outage:
            return
        if self._failing:
            self._failing.discard(lane.vm_id)
            self._perhaps_running.pop(lane.vm_id, None)
        if self.memory.away.pop(lane.vm_id, None) is not None:
            self._journal.note({"k": "back", "vm": lane.vm_id})
            log_event("vm_back", vm_id=lane.vm_id)

    async def _goes_away(self, lane: Lane, text: Text, error: VmAway) -> None:
        log_event("vm_away", level=logging.WARNING, vm_id=lane.vm_id, message_sid=text.sid, error=str(error), attempt=text.attempts)
        self._note_error(text.trace, str(error))
        now = self.steady_now()
        self._failing.add(lane.vm_id)
        if error.reached:
            self._perhaps_running[lane.vm_id] = lane.handed_at
            if error.cut or not text.reached:  # a proxy's 502, again and again, does not prolong the wait
                text.cut_at = now
            text.reached = True
            text.cuts += error.cut
            await self._on_disk({"k": "cut", "sid": text.sid, "n": text.cuts, "at": text.cut_at})
        elif not text.reached:
            text.run_noted = False
            self._journal.note({"k": "held", "sid": text.sid})
        if lane.vm_id not in self.memory.away:
            self.memory.away[lane.vm_id] = now
            self._metrics.outages.add()
            await self._tell(lane, NOTICES["N5"], text, away=True)

    async def _returns(self, lane: Lane, route: Route, text: Text) -> bool:
        """Wait until the VM answers /health; False when the text's time ran out first, or the VM is being changed."""
        while lane.vm_id not in self._held and lane.waiting and lane.waiting[0] is text:
            left = self._deadline(lane, text) - self.steady_now()
            if left <= 0:
                await self._expire(lane)
                return False
            self._ask_fly(lane, route)
            lane.probes += 1
            pause = self._clock.uniform(0, min(4.0, 0.25 * 2 ** min(lane.probes, 10)))
            await self._clock.sleep(min(pause, left) + 0.001)
            if await self._vms.is_healthy(route):
                return True
        return False

    def _ask_fly(self, lane: Lane, route: Route) -> None:
        """A machine that is stopped or suspended does not come back by itself. Fly may take minutes to say: nobody waits for it."""
        now = self._clock.monotonic()
        if now - lane.asked_fly_at < ASK_FLY_EVERY_S or (lane.waker is not None and not lane.waker.done()):
            return

        async def wake() -> None:
            try:
                await self._wake(route.vm_id, route.machine_id)
            except UpstreamError as error:
                log_event("wake_failed", level=logging.WARNING, vm_id=lane.vm_id, error=str(error))
        lane.asked_fly_at, lane.waker = now, self._owner.start(wake())

    async def _wait_while_busy(self, lane: Lane, text: Text) -> None:
        """409: wait without a notice, which does not count as the VM being away."""
        self._sign_of_life(lane)
        now = self._clock.monotonic()
        if text.busy_since is None:
            text.busy_since, text.attempts = now, 1
        if now - text.busy_since > BUSY_LIMIT_S:
            await self._finish(lane, [text], [NOTICES["N9"].format(status=409, text=quoted(text.body))], "failed")
            return
        if lane.alive_at - lane.busy_noted_at > 60:
            lane.busy_noted_at = lane.alive_at
            self._journal.note({"k": "busy", "vm": lane.vm_id, "at": lane.alive_at})
        await self._clock.sleep(self._clock.uniform(0.05, min(10.0, 0.25 * 2 ** min(text.attempts, 10))))
        lane.alive_at = self.steady_now()  # nor does this pause, should the VM be away behind it

    def steady_now(self) -> float:
        """The wall clock as it was at the start, moved on by the monotonic one: nobody who sets a clock makes a text wait too long or not at all."""
        return self._wall_ahead + self._clock.monotonic()

    def _deadline(self, lane: Lane, text: Text) -> float:
        # A gateway's restart is not a cut: what was handed over before it waits for its VM from then on.
        return max((text.cut_at or self._began) if text.reached else text.since, lane.alive_at) + self._settings.vm_away_limit_s

    def _since(self, arrived: float) -> float:
        """A wall-clock second of the past by `steady_now`; one of the future is now."""
        return self.steady_now() - max(0.0, self._clock.now() - arrived)

    def _is_expired(self, lane: Lane, text: Text) -> bool:
        return self._deadline(lane, text) <= self.steady_now()

    async def _expire(self, lane: Lane) -> None:
        """The first text's time is over; those behind it are judged in the same moment and share the notice."""
        first = lane.waiting[0]
        if first.reached:
            await self._finish(lane, [first], [NOTICES["N8"].format(s=f"{self._settings.vm_away_limit_s:g}", text=quoted(first.body))], "silent")
        late = [text for text in lane.waiting if not text.reached and self._is_expired(lane, text)]
        if late:
            await self._finish(lane, late, split_text(self._quote("N6", late)), "expired")

    # Finishing and telling

    async def _on_disk(self, record: Json) -> None:
        """Journal a change of a message that is in already: a full disk does not stop it, the journal is written anew later."""
        with contextlib.suppress(StoreError):
            await self._journal.append(record)

    async def _finish(self, lane: Lane, texts: list[Text], parts: list[str], outcome: str, images: tuple[str, ...] = ()) -> None:
        """Journal the texts' end and what their owner is told, then queue it for sending."""
        last = texts[-1]
        out = Outbound(id=texts[0].sid, parts=parts, images=images, at=self._clock.now(), channel=last.channel, ours=last.ours, traces=[text.trace for text in texts])
        for trace in out.traces:
            trace.outcome, trace.parts, trace.answered = outcome, len(parts) + len(images), self._clock.monotonic() - trace.began
            if outcome != "answered":
                self._metrics.note_text(failed=True)
        record = self._out_record(lane.vm_id, out) | {"re": [text.sid for text in texts]}
        await self._on_disk(record if outcome in ("answered", "failed") else record | {"unheard": True})
        for text in texts:
            if text in lane.waiting:
                lane.waiting.remove(text)
        self._metrics.texts_finished.add(outcome, by=len(texts))
        self._queue_out(lane, out)

    async def _tell(self, lane: Lane, words: str, about: Text | None = None, *, away: bool = False) -> None:
        """A notice: about a text from where that came, else where the owner last texted."""
        pair = {"channel": about.channel, "ours": about.ours} if about else self.memory.pairs.get(lane.vm_id, {})
        out = Outbound(id=f"n-{self._clock.random_id()}", parts=split_text(words), at=self._clock.now(), **pair)
        await self._on_disk(self._out_record(lane.vm_id, out) | ({"away": True} if away else {}))
        self._queue_out(lane, out)

    def _queue_out(self, lane: Lane, out: Outbound) -> None:
        lane = self.lanes.setdefault(lane.vm_id, lane)
        lane.outbox.append(out)
        lane.hold_until = max(lane.hold_until, out.hold_until)
        self._start_sending(lane)

    # Sending

    async def _send(self, lane: Lane) -> None:
        """The send lane: in journal order, the next after Twilio took the last."""
        REQUEST_ID.set("")
        try:
            while lane.outbox:
                await self._deliver(lane, lane.outbox[0])
                lane.outbox.popleft()
        finally:
            lane.sender = None
            self._retire(lane)

    async def _deliver(self, lane: Lane, out: Outbound) -> None:
        while out.sent < len(out.parts) + len(out.images):
            while (pause := lane.hold_until - self._clock.now()) > 0:
                await self._clock.sleep(min(pause, LOOP_GUARD_S))
            if obstacle := self._obstacle(lane, out):
                self._give_up(lane, out, obstacle)
                return
            sms = self._sms(lane, out)
            try:
                sid = await self._twilio.deliver(sms, out.at if out.resumed else None, is_wanted=lambda: not self._obstacle(lane, out))
            except UpstreamError as error:
                if not sms.media or act_on(error) != "as_text":
                    if act_on(error) == "opted_out":
                        self._mute(out.channel + lane.vm_id)
                    self._give_up(lane, out, f"{explain_code(error.code)} ({error})" if error.code in RULINGS else str(error))
                    return
                out.in_words.append(out.sent)
                await self._on_disk({"k": "words", "id": out.id, "n": out.sent})  # before they go: a look-up after a kill must look for them
                continue
            out.sent += 1
            self._metrics.messages_sent.add("sent")
            if self._callback and out.traces:
                self._sent_as[sid] = out.traces
                if len(self._sent_as) > TRACES_KEPT:
                    self._sent_as.popitem(last=False)
            self._journal.note({"k": "sent", "id": out.id, "n": out.sent, "sid": sid})
        for trace in out.traces:
            self._note_sent(trace)

    def _obstacle(self, lane: Lane, out: Outbound) -> str:
        """Why something may not be told any more, or nothing."""
        owner = self._store.routes.get(lane.phone)
        if owner is not None and owner.vm_id != lane.vm_id:
            return "the number has another VM, perhaps another owner"
        return explain_code("21610") if out.channel + lane.vm_id in self.memory.muted else ""

    def _note_sent(self, trace: Trace) -> None:
        """The one log line of a text with which all is well."""
        trace.sent = passed = self._clock.monotonic() - trace.began
        if trace.outcome == "answered":
            self._metrics.text_answer.observe(passed)
            self._metrics.recent_answers.append(passed)
        self._done.append(trace)
        if len(self._done) == 1:
            # Logged together a moment later: a line of its own would cost each text a tenth of all its work.
            asyncio.get_running_loop().call_later(LOG_GATHER_S, self.log_done)

    def log_done(self) -> None:
        """Write the log lines of the texts that ended since the last time."""
        done, self._done = self._done, []
        if not done:
            return
        log_lines("text_done", ("vm_id", "phone", "message_sid", "request_id", "outcome", "attempts", "parts", "ms_to_hand_over", "ms_to_answer", "ms_to_sent"), [
            (trace.vm_id, mask_phone(found[0]) if (found := self._store.find(trace.vm_id)) else None, trace.sid, trace.request_id, trace.outcome, trace.attempts, trace.parts,
             in_ms(trace.handed_over), in_ms(trace.answered), in_ms(trace.sent))
            for trace in done])

    def _sms(self, lane: Lane, out: Outbound) -> Sms:
        """The next message of what is to be told; its callback says whose it is and, if it is a picture, which."""
        body, media, about = "", "", lane.vm_id + ("&again=1" if out.once_more else "")
        if out.sent < len(out.parts):
            body = out.parts[out.sent]
        else:
            image = out.images[out.sent - len(out.parts)]
            media, about = self._link(lane.vm_id, image, out.at), f"{about}&image={image}"
        if out.sent in out.in_words:
            body, media, about = IMAGE_IN_WORDS.format(url=media), "", lane.vm_id
        return Sms(sender=out.ours or out.channel + self._settings.twilio_phone_number, recipient=out.channel + lane.phone, body=body, media=media,
                   callback=self._callback and self._callback + about)

    def _give_up(self, lane: Lane, out: Outbound, words: str) -> None:
        log_event("send_failed", level=logging.ERROR, vm_id=lane.vm_id, message_sid=out.id, error=words)
        self._remember_error(lane.vm_id, words)
        self._metrics.messages_sent.add("failed")
        for trace in out.traces:
            trace.outcome = "send_failed"
            self._note_error(trace, words)
        self._journal.note({"k": "done", "id": out.id})

    def _mute(self, who: str) -> None:
        """Twilio says that they opted out."""
        now = self._clock.now()
        self.memory.mute(who, True, now)
        self._journal.note({"k": "mute", "who": who, "muted": True, "at": now})

    def note_listed(self, until: float) -> None:
        """Twilio's list was read; a text that came by itself says nothing of those that may have been missed before it."""
        self.memory.mark = max(self.memory.mark, until)
        if self._journal.queued != self._queued_at_mark:  # an idle gateway writes nothing; after a kill it reads a longer, empty stretch of the list
            self._journal.note({"k": "mark", "at": until})
            self._queued_at_mark = self._journal.queued

    def _remember_error(self, vm_id: str, words: str) -> None:
        if self.memory.errors.get(vm_id, "") != words:
            self.memory.note_error(vm_id, words)
            self._journal.note({"k": "error", "vm": vm_id, "words": words})

    # What became of what was sent

    async def on_status(self, fields: Mapping[str, str], about: Mapping[str, str]) -> None:
        """One of Twilio's callbacks, which come out of order, twice, and before the create's own answer; `about` is what `_sms` put into its address."""
        sid, status = fields.get("MessageSid", ""), fields.get("MessageStatus", "")
        if RANKS.get(status, -1) <= self._ranks.get(sid, -1):
            return
        self._ranks[sid] = RANKS[status]
        if len(self._ranks) > SEEN_LEAST:
            self._ranks.popitem(last=False)
        self._metrics.deliveries.add(status)
        found, to = self._store.find(about.get("vm", "")), fields.get("To", "")
        if found is None or found[0] != to.removeprefix("whatsapp:") or RANKS[status] < RANKS["delivered"]:
            return
        if status in ("delivered", "read"):
            for trace in self._sent_as.get(sid, ()):
                trace.delivered = self._clock.monotonic() - trace.began
            if to.removesuffix(found[0]) + found[1].vm_id not in self.memory.muted:
                self._remember_error(found[1].vm_id, "")
        elif sid not in self.memory.seen:
            await self._undelivered(self._lane(found[1].vm_id, found[0]), sid, fields, about)

    async def _undelivered(self, lane: Lane, sid: str, fields: Mapping[str, str], about: Mapping[str, str]) -> None:
        """A message that Twilio took and could not deliver: what its code asks for is done once, also across restarts."""
        self.memory.remember(sid, self._clock.now())
        code, image, channel = fields.get("ErrorCode", ""), about.get("image", ""), "whatsapp:" if fields.get("To", "").startswith("whatsapp:") else ""
        act, words = RULINGS[code].act if code in RULINGS else "final", ""
        again = act == "once_more" and not about.get("again")
        log_event("undelivered", level=logging.WARNING, vm_id=lane.vm_id, message_sid=sid, error=explain_code(code))
        self._remember_error(lane.vm_id, explain_code(code))
        self._metrics.twilio_errors.add(code if code in RULINGS else "other")
        for trace in self._sent_as.get(sid, ()):
            self._note_error(trace, explain_code(code))
        if act == "opted_out":
            self._mute(channel + lane.vm_id)
        elif act == "mend":
            self._twilio.trouble = f"texts do not arrive: {explain_code(code)}"
        elif IMAGE_PATH.fullmatch(image) and act == "as_text":
            words, image = IMAGE_IN_WORDS.format(url=self._link(lane.vm_id, image, self._clock.now())), ""
        elif again and not image:
            with contextlib.suppress(UpstreamError):
                words = await retry(lambda: self._twilio.body_of(sid), Retry(), self._clock)
        if words or (again and IMAGE_PATH.fullmatch(image)):
            now = self._clock.now()
            out = Outbound(id=f"a-{sid}", parts=[words] if words else [], images=() if words else (image,), at=now, channel=channel, ours=fields.get("From", ""),
                           once_more=again, hold_until=now + LOOP_GUARD_S if again else 0.0)
            await self._on_disk(self._out_record(lane.vm_id, out) | {"seen": sid})
            self._queue_out(lane, out)
        else:
            self._journal.note({"k": "seen", "sid": sid, "at": int(self._clock.now())})
        self._retire(lane)

    async def say_unasked(self, vm_id: str, phone: str, words: str, images: tuple[str, ...]) -> str:
        """A VM texts its own owner; returns the message's id once it is journaled. Raises Refusal and StoreError."""
        if self.draining:
            raise Refusal("draining", "this gateway is shutting down; try again in a moment")
        pair, now = self.memory.pairs.get(vm_id, {}), self._clock.now()
        if pair.get("channel", "") + vm_id in self.memory.muted:
            raise Refusal("wrong_state", "the owner of this VM opted out of texts (STOP); nothing is sent until they text START")
        times = self.memory.unasked.get(vm_id, ())  # no more of them than a day allows
        for seconds, most in UNASKED_LIMITS:
            recent = [at for at in times if now - seconds < at <= now]
            if len(recent) >= most:
                raise Refusal("too_many", f"a VM may text its owner {most} times in {seconds:g} s", retry_after_s=int(recent[-most] + seconds - now) + 1)
        self.memory.spoke(vm_id, now)
        out = Outbound(id=f"v-{self._clock.random_id()}", parts=split_text(words) if words else [], images=images, at=now, **pair)
        await self._journal.append(self._out_record(vm_id, out) | {"unasked": True})
        lane = self._lane(vm_id, phone)
        lane.still_at = max(lane.still_at, self._clock.monotonic() + STILL_EVERY_S)
        self._queue_out(lane, out)
        self._metrics.unasked.add()
        return out.id

    # What happens to VMs

    async def vm_ready(self, vm_id: str, *, welcome: bool = False) -> None:
        """What waited for a VM to be set up runs now."""
        if welcome and (found := self._store.find(vm_id)):
            await self._tell(self._lane(vm_id, found[0]), NOTICES["N14"])
        if lane := self.lanes.get(vm_id):
            lane.alive_at = self.steady_now()
            self._start_running(lane)

    async def hold(self, vm_id: str, patience_s: float) -> None:
        """Hand nothing more to a VM until `release`; what it is running has so long to end."""
        self._held.add(vm_id)
        deadline = self._clock.monotonic() + patience_s
        while (lane := self.lanes.get(vm_id)) and lane.handing_over and self._clock.monotonic() < deadline:
            await self._clock.sleep(0.1)

    def release(self, vm_id: str, alive_at: float = 0.0) -> None:
        """Go on with a VM that was held; `alive_at`: when it was seen well (`steady_now`), from which its texts' waiting counts."""
        self._held.discard(vm_id)
        if lane := self.lanes.get(vm_id):
            lane.alive_at = max(lane.alive_at, alive_at)
            if lane.waiting:
                self._start_running(lane)

    async def vm_gone(self, vm_id: str, reason: str) -> None:
        """Nothing that belongs to a VM outlives it: its owner reads what was not run. `reason`: `failed` to be set up, `torn_down`, or `vanished`."""
        notice = "N13" if reason == "failed" else "N12"
        if reason == "vanished" and not self.waiting(vm_id) and (found := self._store.find(vm_id)):
            await self._tell(self._lane(vm_id, found[0]), self._quote(notice, []))
        self.memory.forget(vm_id)
        self.last_texts.pop(vm_id, None)
        self._failing.discard(vm_id)
        self._perhaps_running.pop(vm_id, None)
        lane = self.lanes.get(vm_id)
        if lane is None:
            return
        lane.gone = notice
        if lane.runner is not None:
            lane.runner.cancel()
            await asyncio.wait({lane.runner})
            lane.runner = None  # one that had not begun yet did not say so itself
        if texts := list(lane.waiting):
            await self._finish(lane, texts, split_text(self._quote(notice, texts)), "gone")

    # Journal records, there and back

    def _in_record(self, lane: Lane, text: Text) -> Json:
        record: Json = {"k": "in", "sid": text.sid, "vm": lane.vm_id, "at": text.arrived, "body": text.body}
        if text.run_noted:
            record["run"] = True
        if text.media:
            record["media"] = text.media
        return record | self._addresses(text.channel, text.ours)

    def _out_record(self, vm_id: str, out: Outbound) -> Json:
        record = {"k": "out", "id": out.id, "vm": vm_id, "at": out.at, "parts": out.parts}
        for name, value in (("images", out.images), ("sent", out.sent), ("in_words", out.in_words), ("once_more", out.once_more), ("hold_until", out.hold_until)):
            if value:
                record[name] = value
        return record | self._addresses(out.channel, out.ours)

    def _addresses(self, channel: str, ours: str) -> Json:
        usual = ours in ("", channel + self._settings.twilio_phone_number)
        return ({"channel": channel} if channel else {}) | ({} if usual else {"ours": ours})

    def _snapshot(self) -> Iterable[Json | Iterable[bytes]]:
        yield self.memory.line()
        lanes = [*self.lanes.values(), *self._homeless.values()]
        if any(lane.outbox for lane in lanes):  # what was sent must not be taken for what was not
            yield {"k": "claimed", "sids": self._twilio.last_claimed()}
        for lane in lanes:
            if lane.alive_at:
                yield {"k": "busy", "vm": lane.vm_id, "at": lane.alive_at}
            for out in lane.outbox:
                yield self._out_record(lane.vm_id, out)
            for text in lane.waiting:
                yield self._in_record(lane, text)
                if text.cut_at:
                    yield {"k": "cut", "sid": text.sid, "n": text.cuts, "at": text.cut_at}

    async def resume(self, records: Iterable[Json]) -> None:
        """Rebuild the lanes from the journal; `start` sets them going. What belongs to a VM that is gone is not carried over."""
        replay = Replay(self.memory, self._clock.now())
        for record in records:
            replay.apply(record)
        for sid in replay.claimed:
            self._twilio.claim(sid)
        for vm_id, (texts, outs) in replay.by_vm().items():
            found = self._store.find(vm_id)
            phone = found[0] if found else str(self._store.undo.get(vm_id, {}).get("phone_number") or "")
            lane = self._lane(vm_id, phone) if phone else self._homeless.setdefault(vm_id, Lane(vm_id=vm_id, phone=""))
            lane.alive_at = replay.alive.get(vm_id, 0.0)
            for text in texts:
                text.trace, text.since = self._trace(text.sid, vm_id, text.arrived), self._since(text.arrived)
            self._metrics.texts.add("resumed", by=len(texts))
            lane.waiting.extend(texts)
            if any(text.reached for text in texts):
                self._perhaps_running[vm_id] = self._clock.monotonic()
            lane.outbox.extend(outs)
            lane.hold_until = min(self._clock.now() + LOOP_GUARD_S, max((out.hold_until for out in outs), default=0.0))
        # Only now that all lanes are there: what this journals may lead to a rewrite of the journal from them.
        for lane in list(self.lanes.values()):
            found = self._store.find(lane.vm_id)
            if not found or (found[1].state == "failed" and lane.waiting):
                await self.vm_gone(lane.vm_id, "vanished" if found else str(self._store.undo[lane.vm_id].get("reason")))
        if self._homeless:
            log_event("journal_of_unknown_vms", level=logging.WARNING, vms=len(self._homeless), texts=sum(len(lane.waiting) for lane in self._homeless.values()))
            self._owner.start(self._forget_homeless())
        else:
            self.memory.forget_gone(self._store.find)

    def start(self) -> None:
        """Set going what the journal held."""
        for lane in list(self.lanes.values()):
            self._set_going(lane)

    def _set_going(self, lane: Lane) -> None:
        if lane.waiting:
            self._start_running(lane)
        if lane.outbox:
            self._start_sending(lane)

    def house(self) -> None:
        """Routes were found: what the journal held for their VMs goes on."""
        for vm_id, lane in list(self._homeless.items()):
            if found := self._store.find(vm_id):
                del self._homeless[vm_id]
                lane.phone = found[0]
                self.lanes[vm_id] = lane
                self._set_going(lane)

    async def _forget_homeless(self) -> None:
        await self._clock.sleep(HOMELESS_S)
        for vm_id, lane in self._homeless.items():
            log_event("journal_of_gone_vm", level=logging.WARNING, vm_id=vm_id, texts=len(lane.waiting), answers=len(lane.outbox))
        self._homeless.clear()
        self.memory.forget_gone(self._store.find)

    async def drain(self) -> None:
        """Take in nothing more, hand over nothing more; wait for what is in a VM's or Twilio's hands (the caller bounds the wait)."""
        self.draining = True
        for lane in self.lanes.values():
            if lane.runner is not None and not lane.handing_over:
                lane.runner.cancel()
        while tasks := [task for lane in self.lanes.values() for task in (lane.runner, lane.sender) if task]:
            await asyncio.wait(tasks)

    # Telling

    def waiting(self, vm_id: str = "") -> int:
        """Texts not yet finished, of one VM or of all."""
        lanes = [lane] if (lane := self.lanes.get(vm_id)) else [] if vm_id else list(self.lanes.values())
        return sum(len(lane.waiting) for lane in lanes)

    def oldest_waiting_s(self) -> float:
        """Age of the text that waits longest, 0 when none does."""
        return max(0.0, self._clock.now() - min((lane.waiting[0].arrived for lane in self.lanes.values() if lane.waiting), default=float("inf")))

    def away_count(self) -> int:
        return len(self.memory.away)

    def last_call_failed(self, vm_id: str) -> bool:
        return vm_id in self._failing or vm_id in self.memory.away

    def may_be_running(self, vm_id: str) -> bool:
        """Whether a command that was handed over may still be running there, so that a restart would cut it."""
        lane = self.lanes.get(vm_id)
        return bool(lane and lane.handing_over) or self._clock.monotonic() - self._perhaps_running.get(vm_id, float("-inf")) < self._settings.vm_command_timeout_s

    def away_since(self, vm_id: str) -> float | None:
        """Wall-clock second since which the VM is away, or None."""
        return self.memory.away.get(vm_id)


class Backfill:
    """Fetches the texts that arrived while nobody listened from Twilio's list, and hands them in at the same door."""

    AT_START_S = 5.0

    def __init__(self, settings: Settings, clock: Clock, store: RouteStore, twilio: TwilioClient, relay: Relay) -> None:
        self._settings, self._clock, self._store, self._twilio, self._relay = settings, clock, store, twilio, relay

    async def at_start(self) -> None:
        """Before the door opens: whatever Twilio tells within 5 s."""
        with contextlib.suppress(TimeoutError):
            async with time_limit(self._clock, self.AT_START_S):
                await self.once()

    async def run(self) -> None:
        """Again every BACKFILL_S, until Twilio says that this account may not list."""
        while not self._twilio.cannot_list:
            await self._clock.sleep(self._settings.backfill_s)
            await self.once()

    async def once(self) -> None:
        """One look at the lists of our number and of its WhatsApp sender."""
        began, memory = self._clock.now(), self._relay.memory
        memory.mark = memory.mark or began - self._settings.vm_away_limit_s + LIST_OVERLAP_S
        since = memory.mark - LIST_OVERLAP_S
        try:
            found = [message for channel in ("", "whatsapp:") for message in await self._list(channel + self._settings.twilio_phone_number, since)]
            for message in sorted(found, key=lambda message: message.arrived):
                await self._relay.accept(message)
        except UpstreamRejected as error:
            self._twilio.give_up_listing(error)
        except (UpstreamError, Refusal, StoreError) as error:
            log_event("backfill_failed", level=logging.WARNING, error=str(error))
        else:
            if not self._relay.closed:  # else routes are missing by which texts are known
                self._relay.note_listed(began)

    async def _list(self, ours: str, since: float) -> list[InboundMessage]:
        """Unknown texts to this address since then, oldest first; Twilio's filter is on its own date, so ours is applied besides."""
        messages = []
        async for told in self._twilio.list_messages({"To": ours, "DateSent>": timestamp(since)}, pages=20):
            sid, sender, sent = str(told.get("sid") or ""), str(told.get("from") or ""), read_date(told)
            if told.get("direction") != "inbound" or not sid or sid in self._relay.memory.seen or sent is None or sent < since - 1:
                continue
            route = self._store.routes.get(sender.removeprefix("whatsapp:"))
            if route is not None and timestamp(sent) >= route.created_at:
                media = await self._twilio.media_of(sid) if str(told.get("num_media") or "0") != "0" else ()
                messages.append(InboundMessage(sid=sid, sender=sender, recipient=ours,
                                               body=str(told.get("body") or ""), arrived=min(sent, self._clock.now()), media=media, fetched=True))
        return messages[::-1]


class Replay:
    """The journal's records applied one after the other."""

    def __init__(self, memory: Memory, now: float) -> None:
        self.memory, self.now = memory, now
        self.texts: dict[str, tuple[str, Text]] = {}
        self.outs: dict[str, tuple[str, Outbound]] = {}
        self.alive: dict[str, float] = {}
        self.claimed: list[str] = []

    def apply(self, record: Json) -> None:
        """Apply one record; a record of an unknown kind is passed over."""
        apply = getattr(self, f"_on_{record.get('k')}", None)
        if apply is not None:
            try:
                apply(record)
            except (KeyError, TypeError, ValueError) as error:
                log_event("journal_record_unusable", level=logging.ERROR, kind=record.get("k"), error=type(error).__name__)

    def _on_state(self, record: Json) -> None:
        self.memory.restore(record)

    def _on_seen(self, record: Json) -> None:
        self.memory.remember(record["sid"], record["at"], record.get("say", ""))
        if "who" in record:
            self._on_mute(record)

    def _on_mute(self, record: Json) -> None:
        self.memory.mute(record["who"], record["muted"], float(record.get("at", 0)))

    def _on_mark(self, record: Json) -> None:
        self.memory.mark = max(self.memory.mark, record["at"])

    def _on_error(self, record: Json) -> None:
        self.memory.note_error(record["vm"], record["words"])

    def _on_claimed(self, record: Json) -> None:
        self.claimed.extend(record["sids"])

    def _on_in(self, record: Json) -> None:
        text = Text(sid=record["sid"], body=record["body"], arrived=min(record["at"], self.now), channel=record.get("channel", ""), ours=record.get("ours", ""),
                    media=tuple((url, kind) for url, kind in record.get("media", ())))
        self._handed(text, bool(record.get("run")))
        self.texts[text.sid] = (record["vm"], text)
        self.memory.use_pair(record["vm"], {name: record[name] for name in ("channel", "ours") if name in record})
        self.memory.remember(text.sid, text.arrived)

    def _handed(self, text: Text, handed: bool) -> None:
        text.run_noted = text.reached = handed

    def _on_run(self, record: Json) -> None:
        if record["sid"] in self.texts:
            self._handed(self.texts[record["sid"]][1], True)

    def _on_held(self, record: Json) -> None:
        if record["sid"] in self.texts:
            self._handed(self.texts[record["sid"]][1], False)

    def _on_cut(self, record: Json) -> None:
        if record["sid"] in self.texts:
            text = self.texts[record["sid"]][1]
            text.run_noted = text.reached = True
            text.cuts, text.cut_at = record["n"], min(record["at"], self.now)

    def _on_busy(self, record: Json) -> None:
        self.alive[record["vm"]] = min(record["at"], self.now)

    def _on_out(self, record: Json) -> None:
        fields = {name: record[name] for name in ("channel", "ours", "sent", "in_words", "once_more", "hold_until") if name in record}
        out = Outbound(id=record["id"], parts=record["parts"], at=record["at"], images=tuple(record.get("images", ())), resumed=True, **fields)
        self.outs[out.id] = (record["vm"], out)
        for sid in record.get("re", ()):
            self.texts.pop(sid, None)
            if not record.get("unheard"):
                self.alive[record["vm"]] = min(record["at"], self.now)
        if record.get("away"):
            self.memory.away[record["vm"]] = record["at"]
        if record.get("unasked"):
            self.memory.spoke(record["vm"], record["at"])
        if "seen" in record:
            self.memory.remember(record["seen"], record["at"])

    def _on_sent(self, record: Json) -> None:
        if record.get("sid"):
            self.claimed.append(record["sid"])
        if entry := self.outs.get(record["id"]):
            entry[1].sent = max(entry[1].sent, record["n"])
            if entry[1].sent >= len(entry[1].parts) + len(entry[1].images):
                del self.outs[record["id"]]

    def _on_words(self, record: Json) -> None:
        if entry := self.outs.get(record["id"]):
            entry[1].in_words.append(record["n"])

    def _on_done(self, record: Json) -> None:
        self.outs.pop(record["id"], None)

    def _on_back(self, record: Json) -> None:
        self.memory.away.pop(record["vm"], None)

    def by_vm(self) -> dict[str, tuple[list[Text], list[Outbound]]]:
        """What is in flight, per VM and in order."""
        grouped: dict[str, tuple[list[Text], list[Outbound]]] = {}
        for vm_id, text in self.texts.values():
            grouped.setdefault(vm_id, ([], []))[0].append(text)
        for vm_id, out in self.outs.values():
            grouped.setdefault(vm_id, ([], []))[1].append(out)
        return grouped


def in_ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000 + 0.5)


def words_of(answer: Answer) -> list[str]:
    """A VM's answer as parts for a phone."""
    if answer.unreadable:
        return [NOTICES["N11"]]
    if answer.text.strip():
        return split_text(answer.text)
    if answer.images and not answer.exit_code:
        return []
    return [NOTICES["N10 exit"].format(n=answer.exit_code) if answer.exit_code else NOTICES["N10"]]


# --- Fleet ---

# How long a text that is being run has to end before its VM is restarted for a change; an upgrade waits for all of it.
PATIENCE_S = {"restart": 0.0, "rotate": 20.0, "upgrade": float("inf")}


SICK_SWEEPS = 3
RESTART_AGAIN_S = 600.0
DELETIONS_AN_HOUR = 5
AT_ONCE = 20
HEAL_AT_START_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a machine says of whose it is; a VM can write its own metadata, so only `key_id`, the secret its owner mark verifies with, is proof."""

    machine: Machine
    gateway_id: str
    phone: str
    key_id: str

    def route(self, settings: Settings) -> Route:
        machine = self.machine
        return Route(vm_id=machine.app, machine_id=machine.id, vm_url=place(settings, machine.app, machine), region=machine.region, image=machine.image,
                     state="ready", created_at=timestamp(machine.created_at or 0), key_id=self.key_id)


def read_claim(machine: Machine, settings: Settings) -> Claim | None:
    """The claim of a machine that carries our host's stamp."""
    host, _, gateway_id = machine.metadata.get("cockpit_gateway", "").rpartition("/")
    if host != gateway_host(settings) or not gateway_id:
        return None
    phone, mark = machine.metadata.get("cockpit_phone", ""), machine.metadata.get("cockpit_owner", "").encode()
    proof = [root for root in settings.secrets if PHONE.fullmatch(phone) and hmac.compare_digest(owner_mark(root, machine.app, phone).encode(), mark)]
    return Claim(machine=machine, gateway_id=gateway_id, phone=phone, key_id=fingerprint(proof[0]) if proof else "")


@dataclass(slots=True, kw_only=True)
class Census:
    """What Fly holds for our host: proven claims by gateway and phone, and in words what is left out."""

    claims: dict[str, dict[str, Claim]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)

    def choose(self, wanted: str, own: str) -> str:
        """The gateway_id to go on as: the one asked for, else the file's own, else the only one; raises StoreError when that is not clear."""
        if wanted or own in self.claims:
            if (wanted or own) not in self.claims:
                raise StoreError(f"Fly holds no VM of the gateway {wanted}; it holds: {self._named() or 'none'}")
            return wanted or own
        if len(self.claims) > 1:
            raise StoreError(f"Fly holds VMs of several gateways of this host: {self._named()}; say which is this one: python cockpit.py restore --gateway ID")
        return next(iter(self.claims), "")

    def _named(self) -> str:
        return ", ".join(f"{gateway_id} ({len(claims)} VMs)" for gateway_id, claims in sorted(self.claims.items()))


async def take_census(fly: FlyClient, settings: Settings, clock: Clock) -> Census:
    """Ask Fly for all that carries our host's stamp; an app counts only when Fly, asked for it, knows it. Raises UpstreamError."""
    apps = await fly.list_apps()
    machines, unasked = await fly.list_org_machines()
    census, several = Census(unasked=unasked), Counter[tuple[str, str]]()
    claims = [claim for machine in machines if machine.app in apps and not machine.state.startswith("destroy") and (claim := read_claim(machine, settings))]
    limit = asyncio.Semaphore(AT_ONCE)

    async def is_there(claim: Claim) -> bool:
        async with limit:
            with contextlib.suppress(UpstreamNotFound):
                return bool(await retry(lambda: fly.get_app(claim.machine.app), fly.retry, clock))
        return False
    there = await asyncio.gather(*map(is_there, claims))
    claims = [claim for claim, known in zip(claims, there, strict=True) if known]
    several.update((claim.gateway_id, claim.phone) for claim in claims if claim.key_id)
    for claim in claims:
        if not claim.key_id:
            pooled = "cockpit_pool" in claim.machine.metadata
            census.skipped.append(f"{claim.machine.app}: " + ("it waited in a pool, whose machines are made anew; a sweep destroys it" if pooled else
                                                             "its owner mark does not verify with COCKPIT_SECRET"))
        elif several[claim.gateway_id, claim.phone] > 1:
            census.skipped.append(f"{claim.machine.app}: not the only VM that claims {mask_phone(claim.phone)}")
        else:
            census.claims.setdefault(claim.gateway_id, {})[claim.phone] = claim
    return census


@dataclass(slots=True, kw_only=True, eq=False)
class Change:
    """A restart, rotation or upgrade on its way."""

    vm_id: str
    what: str
    task: asyncio.Task[None] | None = None

    async def outcome(self) -> None:
        """Wait for its end; raises Refusal. A caller who hangs up stops nothing."""
        assert self.task is not None
        await asyncio.wait({self.task})
        if self.task.cancelled():
            raise Refusal("torn_down", f"{self.vm_id} was deleted during the {self.what}", vm_id=self.vm_id)
        self.task.result()


class Fleet:
    """Keeps VMs in order: changes each by one hand at a time while its texts wait, and holds the routes against what Fly has."""

    def __init__(self, settings: Settings, clock: Clock, store: RouteStore, fly: FlyClient, vms: VmClient, provisioner: Provisioner, relay: Relay, owner: Owner) -> None:
        self._settings, self._clock, self._store, self._fly, self._vms = settings, clock, store, fly, vms
        self._provisioner, self._relay, self._owner = provisioner, relay, owner
        self.changes: dict[str, Change] = {}
        self.troubles: list[str] = []
        self._seen: set[tuple[str, str]] = set()  # what the last sweep saw and did not act on: (what, vm_id)
        self._sick: dict[str, int] = {}  # sweeps in a row
        self._restarted: dict[str, float] = {}  # monotonic, as are the next
        self._deleted: deque[float] = deque(maxlen=DELETIONS_AN_HOUR)

    # Changing one VM

    def begin(self, vm_id: str, what: str, credentials: Mapping[str, str] | None = None) -> Change:
        """Take on a `restart`, `rotate` or `upgrade`; raises Refusal when the VM is not ready for it."""
        record = self._provisioner.look_up(vm_id)
        change = Change(vm_id=record["vm_id"], what=what)
        if record["state"] != "ready" or change.vm_id in self.changes:
            state = f"in the middle of a {self.changes[change.vm_id].what}" if change.vm_id in self.changes else record["state"]
            raise Refusal("wrong_state", f"{change.vm_id} is {state}; this needs it to be ready", vm_id=change.vm_id)
        if self._provisioner.draining:
            raise Refusal("draining", "this gateway is shutting down; try again in a moment")
        self.changes[change.vm_id] = change
        change.task = self._owner.start(self._change(change, record["phone_number"], credentials or {}), f"{what} {change.vm_id}")
        log_event(f"{what}_begun", vm_id=change.vm_id)
        return change

    async def _change(self, change: Change, phone: str, credentials: Mapping[str, str]) -> None:
        vm_id, alive_at, trouble = change.vm_id, 0.0, f"{change.what}: cut off, ask for it again"
        try:
            await self._relay.hold(vm_id, min(PATIENCE_S[change.what], self._settings.vm_command_timeout_s))
            if change.what == "restart":
                await self._restart(vm_id)
            elif change.what == "rotate":
                await self._settle(vm_id, await self._replace_config(phone, vm_id, credentials))
            else:
                await self._upgrade(phone, vm_id)
            alive_at, trouble = self._relay.steady_now(), ""
        except (CockpitError, TimeoutError) as error:
            refusal = self._explain(change, error)
            trouble = f"{change.what}: {refusal.detail}"
            raise refusal from error
        finally:
            self.changes.pop(vm_id, None)
            self._relay.release(vm_id, alive_at)
            with contextlib.suppress(StoreError):
                await self._note(vm_id, last_error=trouble)
            log_event(f"{change.what}_{'failed' if trouble else 'done'}", vm_id=vm_id, error=trouble)

    def _explain(self, change: Change, error: Exception) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, UpstreamError):
            return told_of_fly(error, vm_id=change.vm_id)
        if isinstance(error, StoreError):
            return Refusal("storage", str(error), vm_id=change.vm_id)
        return Refusal("vm_unhealthy", f"{change.vm_id} did not answer /health within {self._settings.provision_timeout_s:g} s (PROVISION_TIMEOUT_S) of the {change.what}", vm_id=change.vm_id)

    async def _note(self, vm_id: str, **changes: str) -> None:
        """Change a route that is still there, on disk."""
        if (found := self._store.find(vm_id)) and (noted := replace(found[1], **changes)) != found[1]:  # type: ignore[arg-type]
            self._store.put(found[0], noted)
            await self._store.commit()

    def _route(self, vm_id: str) -> Route:
        if found := self._store.find(vm_id):
            return found[1]
        raise Refusal("torn_down", f"{vm_id} was deleted meanwhile", vm_id=vm_id)

    async def _machine(self, vm_id: str) -> Machine:
        machine = await self._fly.get_machine(vm_id, self._route(vm_id).machine_id)
        if not machine.host_ok or not machine.config:
            raise Refusal("fly_unavailable", "Fly does not reach the host this VM is on; try again later", retry_after_s=60, vm_id=vm_id)
        return machine

    async def _restart(self, vm_id: str) -> None:
        machine = await self._machine(vm_id)
        await self._fly.restart_machine(vm_id, machine)
        # Right after the call Fly may still show the old `started`: only an event after the last one counts.
        await self._settle(vm_id, machine, machine.last_event)

    async def _replace_config(self, phone: str, vm_id: str, credentials: Mapping[str, str], image: str = "") -> Machine:
        """Set secrets, ours renewed among them, and send the whole fresh config back, for a VM reads secrets only as it boots."""
        machine = await self._machine(vm_id)
        version = await self._fly.set_secrets(vm_id, {**credentials, **self._provisioner.own_secrets(vm_id)})
        config = {**machine.config, "image": image or machine.image, "metadata": {**machine.metadata, **self._provisioner.stamp(vm_id, phone)}}
        updated = await self._fly.update_machine(vm_id, machine, config, version)
        await self._note(vm_id, key_id=fingerprint(self._settings.secrets[0]))
        return updated

    async def _settle(self, vm_id: str, machine: Machine, after_event: str = "") -> None:
        async with time_limit(self._clock, self._settings.provision_timeout_s):
            await self._provisioner.wait_started(vm_id, machine, after_event)
            await self._provisioner.wait_healthy(self._route(vm_id))

    async def _upgrade(self, phone: str, vm_id: str) -> None:
        """Move to the present VM_IMAGE; back to the old one, the very build if the tag is the same, when that is not healthy."""
        before, image = await self._machine(vm_id), self._settings.vm_image
        updated = await self._replace_config(phone, vm_id, {}, image)
        try:
            await self._settle(vm_id, updated)
        except (CockpitError, TimeoutError) as error:
            old = before.image if before.image != image else before.build or image
            log_event("upgrade_undone", level=logging.WARNING, vm_id=vm_id, image=image, back_to=old, error=str(error))
            await self._settle(vm_id, await self._replace_config(phone, vm_id, {}, old))
            raise Refusal("vm_unhealthy", f"{vm_id} did not become healthy on {image}; it is back on {old}", vm_id=vm_id) from error
        await self._note(vm_id, image=image)

    # Holding the routes against Fly

    async def run(self) -> None:
        """Sweep every RECONCILE_S; while Fly refuses us, up to 5 minutes apart."""
        refusals = 0
        while True:
            every = self._settings.reconcile_s
            await self._clock.sleep(max(every, min(REFUSED_CAP_S, every * 2 ** refusals)))
            try:
                await self.sweep()
            except CockpitError as error:
                refusals = min(refusals + 1, 10) if self._fly.trouble else 0
                self.troubles = [] if self._fly.trouble else [f"Fly could not be compared with the routes: {error}"]
                log_event("sweep_failed", level=logging.DEBUG if self._fly.trouble else logging.WARNING, error=str(error))
            except Exception:
                log.exception("sweep_failed")
            else:
                refusals = 0

    async def sweep(self) -> None:
        """One comparison. What Fly shows once may be its lists lagging: nothing is given up or deleted that was not seen on two sweeps."""
        apps = await self._fly.list_apps()
        machines, unasked = await self._fly.list_org_machines()
        by_app: dict[str, list[Machine]] = {}
        for machine in machines:
            by_app.setdefault(machine.app, []).append(machine)
        seen: set[tuple[str, str]] = set()
        troubles = [f"Fly could not ask its regions {', '.join(unasked)}: nothing is concluded from what is missing"] if unasked else []
        await self._tend(by_app)
        if not unasked:
            await self._find_vanished(apps, by_app, seen)
        await self._sort_strangers(apps, by_app, seen, troubles)
        self._seen, self.troubles = seen, troubles

    async def _each(self, work: Iterable[Coroutine[Any, Any, None]]) -> None:
        """A few at a time; the failure of one is logged and left to the next sweep."""
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(item: Coroutine[Any, Any, None]) -> None:
            async with limit:
                try:
                    await item
                except CockpitError as error:
                    log_event("sweep_step_failed", level=logging.WARNING, error=str(error))
        await asyncio.gather(*map(one, work))

    async def _tend(self, by_app: Mapping[str, list[Machine]]) -> None:
        """Start what stopped; look after what does not answer."""
        work, suspects = [], set()
        for route in self._store.routes.values():
            machine = next((machine for machine in by_app.get(route.vm_id, ()) if machine.id == route.machine_id), None)
            if route.state != "ready" or machine is None or route.vm_id in self.changes:
                continue
            if machine.state in ("stopped", "suspended"):
                work.append(self._fly.wake(route.vm_id, route.machine_id))
            elif machine.state == "started" and self._relay.last_call_failed(route.vm_id):
                suspects.add(route.vm_id)
                work.append(self._look_after(route))
        self._sick = {vm_id: sweeps for vm_id, sweeps in self._sick.items() if vm_id in suspects}
        await self._each(work)

    async def _look_after(self, route: Route) -> None:
        """Restart a VM that hangs: three sweeps without /health, nothing that may be running, not twice in 10 minutes."""
        if await self._vms.is_healthy(route):
            self._sick.pop(route.vm_id, None)
            return
        self._sick[route.vm_id] = self._sick.get(route.vm_id, 0) + 1
        now = self._clock.monotonic()
        if self._sick[route.vm_id] < SICK_SWEEPS or now - self._restarted.get(route.vm_id, float("-inf")) < RESTART_AGAIN_S or self._relay.may_be_running(route.vm_id):
            return
        self._restarted = {vm_id: at for vm_id, at in self._restarted.items() if now - at < RESTART_AGAIN_S} | {route.vm_id: now}
        log_event("hung_vm_restarted", level=logging.WARNING, vm_id=route.vm_id)
        self.begin(route.vm_id, "restart")

    async def _find_vanished(self, apps: set[str], by_app: Mapping[str, list[Machine]], seen: set[tuple[str, str]]) -> None:
        missing = [(phone, route) for phone, route in self._store.routes.items() if route.state == "ready" and route.vm_id not in self.changes
                   and not (route.vm_id in apps and any(machine.id == route.machine_id for machine in by_app.get(route.vm_id, ())))]
        seen.update(("vanished", route.vm_id) for _, route in missing)
        await self._each(self._give_up(phone, route) for phone, route in missing if ("vanished", route.vm_id) in self._seen)

    async def _give_up(self, phone: str, route: Route) -> None:
        """A VM that Fly, asked for it, does not know either is gone: its owner is told once, its number is free for another."""
        try:
            machine = await self._fly.get_machine(route.vm_id, route.machine_id)
        except UpstreamNotFound:
            machine = None
        if (machine and (machine.state != "destroyed" or not machine.host_ok)) or self._store.routes.get(phone) is not route:
            return
        log_event("vm_vanished", level=logging.ERROR, vm_id=route.vm_id, phone=mask_phone(phone))
        self._store.put(phone, replace(route, state="failed", last_error="its machine is gone from Fly"))
        await self._store.commit()
        await self.vm_gone(route.vm_id, "vanished")

    def _is_known(self, app: str) -> bool:
        return bool(self._store.find(app)) or app in self._store.undo or app in self._store.pool or app in self._provisioner.jobs

    async def _sort_strangers(self, apps: set[str], by_app: Mapping[str, list[Machine]], seen: set[tuple[str, str]], troubles: list[str]) -> None:
        """Apps in no section of the file: ours are adopted when they prove whose they are, else deleted; others are only reported."""
        ours, foreign = [], []
        for app, machines in by_app.items():
            if self._is_known(app):
                continue
            claims = [read_claim(machine, self._settings) for machine in machines]
            if all(claim and claim.gateway_id == self._store.gateway_id for claim in claims) and claims[0]:
                ours.append(claims[0])
            elif app.startswith(self._settings.vm_app_prefix + "-") or any(claims):
                foreign.append(app)
        claimed = Counter(claim.phone for claim in ours if self._is_owed(claim))
        for claim in ours:
            if self._is_owed(claim) and claimed[claim.phone] > 1:
                troubles.append(f"{claimed[claim.phone]} VMs claim {mask_phone(claim.phone)}, which has no route: delete the wrong one at Fly")
                continue
            what = "adopt" if self._is_owed(claim) else "orphan"
            seen.add((what, claim.machine.app))
            if (what, claim.machine.app) in self._seen:
                await self._each([self._adopt(claim) if what == "adopt" else self._delete_orphan(claim, troubles)])
        bare = sorted(app for app in apps - set(by_app) if app.startswith(self._settings.vm_app_prefix + "-") and not self._is_known(app))
        seen.update(("bare", app) for app in bare)
        for which, words in ((sorted(foreign), "with another stamp or none"), ([app for app in bare if ("bare", app) in self._seen], "without a machine")):
            if which:
                troubles.append(f"{len(which)} apps {words} are not touched: {', '.join(which[:5])}{', ...' if len(which) > 5 else ''}")

    def _is_owed(self, claim: Claim) -> bool:
        """Whether a machine proves to belong to a phone that has no route."""
        return bool(claim.key_id) and claim.phone not in self._store.routes

    async def _fresh(self, claim: Claim) -> Claim | None:
        """The claim as Fly tells it now, asked for this very machine; None when it is gone, out of reach or known meanwhile."""
        app = claim.machine.app
        try:
            await self._fly.get_app(app)
            machine = replace(await self._fly.get_machine(app, claim.machine.id), app=app)
        except UpstreamNotFound:
            return None
        now = read_claim(machine, self._settings)
        return now if now and machine.host_ok and now.gateway_id == self._store.gateway_id and not self._is_known(app) else None

    async def _adopt(self, claim: Claim) -> None:
        vm_id = claim.machine.app
        if self._clock.monotonic() - self._provisioner.gone.get(vm_id, float("-inf")) < 3600 or not (now := await self._fresh(claim)) or not self._is_owed(now):
            return
        self._store.put(now.phone, now.route(self._settings))
        self._relay.house()
        log_event("vm_adopted", level=logging.WARNING, vm_id=vm_id, phone=mask_phone(now.phone))
        await self._store.commit()

    async def _delete_orphan(self, claim: Claim, troubles: list[str]) -> None:
        created, now = claim.machine.created_at, self._clock.monotonic()
        if created is None or self._clock.now() - created <= 2 * self._settings.provision_timeout_s:
            return
        if len(self._deleted) == DELETIONS_AN_HOUR and now - self._deleted[0] < 3600:
            words = f"VMs of ours without a route are left alone for now, since {DELETIONS_AN_HOUR} were deleted within the hour: look why there are so many"
            troubles.extend([words] if words not in troubles else [])
            return
        if not (fresh := await self._fresh(claim)) or self._is_owed(fresh):
            return
        self._deleted.append(now)
        log_event("orphan_deleted", level=logging.WARNING, vm_id=claim.machine.app)
        await self._provisioner.discard(claim.machine.app)

    # A lost disk

    async def heal(self) -> None:
        """Adopt what Fly holds for our host, for an empty file may be a lost disk; while Fly is out of reach make no VM, and try on."""
        try:
            async with time_limit(self._clock, HEAL_AT_START_S):
                await self._adopt_all()
        except UpstreamRejected as error:  # it would refuse the next VM as well, and that answer says more than ours
            log_event("adoption_refused", level=logging.WARNING, error=str(error))
        except (UpstreamError, TimeoutError) as error:
            self._close(f"routes.json is empty and Fly cannot be asked yet what it holds for this gateway ({error or 'no answer in time'})")
            self._owner.start(self._heal_later(), "adopt VMs")

    def _close(self, words: str) -> None:
        self._provisioner.closed = self._relay.closed = words

    async def _heal_later(self) -> None:
        pause = 2.0
        while self._provisioner.closed:
            await self._clock.sleep(pause)
            pause = min(REFUSED_CAP_S, pause * 2)
            try:
                await self._adopt_all()
                self._close("")
            except CockpitError as error:
                self._close(f"the VMs that Fly holds for this gateway are not adopted yet: {error}")

    async def _adopt_all(self) -> None:
        census = await take_census(self._fly, self._settings, self._clock)
        if census.unasked:
            raise UpstreamUnavailable("fly", "list org machines", words=f"the regions {', '.join(census.unasked)} were not asked")
        for words in census.skipped:
            log_event("vm_not_adopted", level=logging.WARNING, why=words)
        if chosen := census.choose("", self._store.gateway_id):
            self._store.adopt(chosen, {phone: claim.route(self._settings) for phone, claim in census.claims[chosen].items()})
            self._relay.house()
            log_event("vms_adopted", level=logging.WARNING, vms=len(census.claims[chosen]), gateway_id=chosen)
            with contextlib.suppress(StoreError):
                await self._store.commit()

    async def vm_gone(self, vm_id: str, reason: str) -> None:
        """A VM that is torn down is changed no further, and nothing that belongs to it outlives it."""
        if (change := self.changes.get(vm_id)) and change.task:
            change.task.cancel()
        await self._relay.vm_gone(vm_id, reason)


# --- HTTP ---

PROVISION_BODY_BYTES = 512 * 1024
SMS_BODY_BYTES = 64 * 1024
MESSAGE_BODY_BYTES = 256 * 1024
PICTURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF87a": "image/gif", b"GIF89a": "image/gif"}
XML_HEADERS = CIMultiDict({"Content-Type": "text/xml; charset=utf-8"})
CREDENTIAL_BYTES = 8 * 1024
STREAM_BEAT_S = 15.0
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,127}")
RESERVED = re.compile(r"PATH|HOME|PORT|HOST|GITHUB_TOKEN|NODE_OPTIONS|BASH_ENV|(LD_|PYTHON|FLY_|COCKPIT_).*")
REQUEST_IDS = re.compile(r"[A-Za-z0-9._-]{8,64}")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """The running parts, as handlers reach them."""

    settings: Settings
    clock: Clock
    store: RouteStore
    journal: Journal
    fly: FlyClient
    twilio: TwilioClient
    vms: VmClient
    relay: Relay
    provisioner: Provisioner
    fleet: Fleet
    owner: Owner
    metrics: Metrics
    burst: Burst


GATEWAY = web.AppKey("gateway", Gateway)
SETTINGS = web.AppKey("settings", Settings)
METRICS = web.AppKey("metrics", Metrics)


def problem_of(refusal: Refusal) -> Json:
    """An RFC 9457 problem document."""
    return {"type": "about:blank", "title": HTTPStatus(refusal.status).phrase, "status": refusal.status, "detail": refusal.detail, "code": refusal.code, **refusal.members}


def problem(refusal: Refusal) -> web.Response:
    return web.Response(body=dump(problem_of(refusal)).encode(), status=refusal.status, content_type="application/problem+json", headers=refusal.headers)


def refusal_of(error: Exception) -> Refusal:
    """What a caller is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, StoreError):
        return Refusal("storage", str(error))
    if isinstance(error, UpstreamError):
        return told_of_fly(error)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return Refusal("method_not_allowed", f"{error.method} is not possible here; allowed: {allowed}", headers={"Allow": allowed})
    if isinstance(error, web.HTTPException):
        code = {404: "not_found", 413: "too_large"}.get(error.status, "malformed")
        return Refusal(code, error.text or error.reason)
    raise error


@web.middleware
async def answer_errors(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """The one place where errors become answers; each request has an id here, Fly's or a new one, which its log lines and its answer carry."""
    given = request.headers.get("Fly-Request-Id", "")
    REQUEST_ID.set(given if REQUEST_IDS.fullmatch(given) else f"{random.getrandbits(64):016x}")
    resource = request.match_info.route.resource
    call, response = resource.canonical if resource is not None else "unknown", None
    try:
        if request.path.startswith("/provision"):  # also what has no such path or method
            require_key(request)
        response = await handler(request)
    except (CockpitError, web.HTTPException) as error:
        refusal = refusal_of(error)
        response = problem(refusal)
        request.app[METRICS].refusals.add(call, refusal.code)
        if refusal.status >= 500 or refusal.code in ("unauthorized", "bad_signature"):
            log_event("request_refused", level=logging.WARNING, method=request.method, call=call, status=refusal.status, code=refusal.code, error=scrub(refusal.detail))
    except Exception:
        log.exception("request_failed", extra={"names": ("method", "call"), "rows": [(request.method, call)]})
        response = problem(Refusal("internal", "something went wrong here; the log says what"))
    if not response.prepared:
        response.headers["X-Request-Id"] = REQUEST_ID.get()
    return response


def event_stream(headers: Mapping[str, str] | None = None) -> web.StreamResponse:
    """An answer of server-sent events, to be prepared and written to."""
    own = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Request-Id": REQUEST_ID.get()}
    return web.StreamResponse(headers={**own, **(headers or {})})


def bearer_of(request: web.Request) -> str:
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else ""


def is_bearer(request: web.Request, keys: Iterable[str]) -> bool:
    """Whether the caller sent one of `keys`; every one is compared, in constant time."""
    given = bearer_of(request) or request.headers.get("X-API-Key", "")
    digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
    return any([hmac.compare_digest(hashlib.sha256(key.encode()).digest(), digest) for key in keys])


def require_key(request: web.Request) -> None:
    """Refuse a caller without the API key."""
    if not is_bearer(request, request.app[SETTINGS].api_keys):
        raise Refusal("unauthorized", "send the API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`", headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: web.Request, limit: int, content_type: str) -> bytes:
    """The body of a request of this type and at most this size; raises Refusal."""
    if request.content_type != content_type:
        raise Refusal("unsupported_media_type", f"send Content-Type: {content_type}")
    if (request.content_length or 0) <= limit:
        with contextlib.suppress(web.HTTPRequestEntityTooLarge):
            try:
                raw = await request.read()
            except (web.RequestPayloadError, ConnectionError):
                raise Refusal("malformed", "the body does not arrive as its headers say") from None
            if len(raw) <= limit:
                return raw
    raise Refusal("too_large", f"the body is larger than {limit // 1024} KiB")


async def read_json(request: web.Request, limit: int) -> Json:
    raw = await read_body(request, limit, "application/json")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refusal("malformed", "the body must be a JSON object")
    return body


class Faults:
    """Collects what is wrong with a request's fields, so that all is told at once."""

    def __init__(self) -> None:
        self.errors: list[Json] = []

    def add(self, name: str, message: str) -> None:
        self.errors.append({"field": name, "message": message})

    def unknown(self, body: Json, known: Iterable[str]) -> None:
        for name in sorted(set(body) - set(known)):
            self.add(scrub(name)[:100], "is not a field of this request; leave it out")

    def credential(self, name: str, value: object) -> None:
        if not isinstance(value, str) or not value:
            self.add(name, "must be a text that is not empty")
        elif CONTROL.search(value):
            self.add(name, "must not hold control characters, such as a line end")
        elif len(value.encode()) > CREDENTIAL_BYTES:
            self.add(name, f"must not be longer than {CREDENTIAL_BYTES // 1024} KiB")

    def check(self) -> None:
        if self.errors:
            fields = ", ".join(error["field"] for error in self.errors)
            raise Refusal("invalid_request", f"these fields are not valid: {fields}", errors=self.errors)


def check_credentials(body: Json, faults: Faults) -> dict[str, str]:
    """The environment variables that `github_token` and `api_keys` ask for."""
    credentials: dict[str, str] = {}
    if "github_token" in body:
        faults.credential("github_token", body["github_token"])
        credentials["GITHUB_TOKEN"] = body["github_token"]
    keys = body.get("api_keys", {})
    if not isinstance(keys, dict) or ("api_keys" in body and not 1 <= len(keys) <= 50):
        faults.add("api_keys", "must be an object of 1 to 50 environment variables, such as {\"ANTHROPIC_API_KEY\": \"...\"}")
        return credentials
    for name, value in keys.items():
        label = f"api_keys.{scrub(name)[:100]}"
        if not VARIABLE.fullmatch(name):
            faults.add(label, "must be named like an environment variable: A-Z, 0-9 and _, a letter first")
        elif RESERVED.fullmatch(name):
            faults.add(label, "is a reserved name; choose another")
        else:
            faults.credential(label, value)
    return credentials | keys


def parse_order(body: Json, settings: Settings) -> Order:
    """A provisioning request, checked field by field; raises Refusal invalid_request naming each that is wrong."""
    faults = Faults()
    faults.unknown(body, ("phone_number", "github_token", "api_keys", "region", "welcome"))
    for name in ("phone_number", "github_token", "api_keys"):
        if name not in body:
            faults.add(name, "is required")
    phone, given = "", body.get("phone_number", "+10000000")
    try:
        if not isinstance(given, str):
            raise ValueError("must be a text such as \"+15551234567\"")
        phone = normalise_phone(given)
        if phone == settings.twilio_phone_number:
            raise ValueError("is this gateway's own number; give the engineer's")
    except ValueError as error:
        faults.add("phone_number", str(error))
    credentials = check_credentials(body, faults)
    region, welcome = body.get("region"), body.get("welcome")
    if region is not None and not (isinstance(region, str) and re.fullmatch(r"[a-z]{2,5}", region)):
        faults.add("region", "must be a Fly region code such as iad")
    if welcome is not None and not isinstance(welcome, bool):
        faults.add("welcome", "must be true or false")
    faults.check()
    return Order(phone=phone, credentials=credentials, region=region or "", welcome=bool(welcome))


def show(gateway: Gateway, record: Json) -> Json:
    """The VM record with what only the relay knows."""
    if record["state"] == "ready" and (change := gateway.fleet.changes.get(record["vm_id"])):
        record = record | {"state": "away", "step": change.what}
    elif record["state"] == "ready" and gateway.relay.away_since(record["vm_id"]) is not None:
        record = record | {"state": "away"}
    return record | {"last_error": record["last_error"] or gateway.relay.last_errors.get(record["vm_id"])}


def json_response(body: Json, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=dump(body).encode(), status=status, content_type="application/json", headers={"Cache-Control": "no-store", **(headers or {})})


def wants_no_wait(request: web.Request) -> bool:
    """Whether the caller asked to be answered at once (RFC 7240)."""
    return any(part.strip().lower() == "respond-async" for header in request.headers.getall("Prefer", []) for part in re.split("[,;]", header))


async def post_provision(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    job = gateway.provisioner.begin(parse_order(await read_json(request, PROVISION_BODY_BYTES), gateway.settings))
    location = {"Location": f"/provision/{job.vm_id}"}
    if "text/event-stream" in request.headers.get("Accept", "").lower():
        return await stream_steps(request, job, location)
    if wants_no_wait(request):
        await gateway.store.commit()  # 202 is a promise: it is kept across a crash
        return json_response(show(gateway, gateway.provisioner.look_up(job.vm_id)), status=202, headers={**location, "Preference-Applied": "respond-async"})
    record = show(gateway, gateway.provisioner.describe(job.order.phone, await job.outcome()))
    return json_response(record, status=201, headers=location)


async def stream_steps(request: web.Request, job: Job, headers: Mapping[str, str]) -> web.StreamResponse:
    """Each step of a provisioning as it ends, as server-sent events, a comment line when nothing happens for 15 s; a dropped stream stops nothing."""
    gateway, told = request.app[GATEWAY], 0
    response = event_stream(headers)
    assert job.task is not None
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        while True:
            for step, seconds in list(job.seconds.items())[told:]:
                told += 1
                await response.write(server_sent("step", {"step": step, "seconds": seconds}))
            if job.task.done():
                break
            beat = asyncio.ensure_future(gateway.clock.sleep(STREAM_BEAT_S))
            awaited: set[asyncio.Future[Any]] = {job.task, job.moved, beat}
            if (await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED))[0] == {beat}:
                await response.write(b": still working\n\n")
            beat.cancel()
        try:
            last = server_sent("ready", show(gateway, gateway.provisioner.describe(job.order.phone, await job.outcome())))
        except Refusal as refusal:
            last = server_sent("failed", problem_of(refusal))
        await response.write(last)
        await response.write_eof()
    return response


def server_sent(event: str, told: Json) -> bytes:
    return f"event: {event}\ndata: {dump(told)}\n\n".encode()


def vm_ids_after(store: RouteStore, after: str, limit: int) -> list[str]:
    """Up to `limit` ids behind `after`, in order, of VMs that are routed or being deleted."""
    deleting = [vm_id for vm_id, entry in store.undo.items() if vm_id > after and entry.get("reason") != "failed"]
    vm_ids = store.page(after, limit)
    return sorted(vm_ids + deleting)[:limit] if deleting else vm_ids


async def get_provisions(request: web.Request) -> web.Response:
    gateway, faults = request.app[GATEWAY], Faults()
    raw, after = request.query.get("limit", "100"), request.query.get("after", "")
    if not re.fullmatch(r"[0-9]{1,4}", raw) or not 1 <= int(raw) <= 1000:
        faults.add("limit", "must be a whole number from 1 to 1000")
    faults.check()
    limit = int(raw)
    vm_ids = vm_ids_after(gateway.store, after, limit + 1)
    vms = [show(gateway, gateway.provisioner.look_up(vm_id)) for vm_id in vm_ids[:limit]]
    return json_response({"vms": vms, "next": vm_ids[limit - 1] if len(vm_ids) > limit else None})


async def get_provision(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    return json_response(show(gateway, gateway.provisioner.look_up(request.match_info["vm_id"])))


async def delete_provision(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    vm_id = gateway.provisioner.look_up(request.match_info["vm_id"])["vm_id"]
    # A caller who hangs up must not leave the teardown half-way.
    if await asyncio.shield(gateway.owner.start(gateway.provisioner.tear_down(vm_id), "tear down")):
        return web.Response(status=204)
    return json_response(show(gateway, gateway.provisioner.look_up(vm_id)), status=202)


async def change_vm(request: web.Request, what: str, credentials: Mapping[str, str] | None = None) -> web.Response:
    """Restart, rotate or upgrade a VM; with `Prefer: respond-async` the record's `step` says how long it lasts and `last_error` how it ended."""
    gateway = request.app[GATEWAY]
    change = gateway.fleet.begin(request.match_info["vm_id"], what, credentials)
    if wants_no_wait(request):
        headers = {"Location": f"/provision/{change.vm_id}", "Preference-Applied": "respond-async"}
        return json_response(show(gateway, gateway.provisioner.look_up(change.vm_id)), status=202, headers=headers)
    await change.outcome()
    return json_response(show(gateway, gateway.provisioner.look_up(change.vm_id)))


async def patch_provision(request: web.Request) -> web.Response:
    body, faults = await read_json(request, PROVISION_BODY_BYTES), Faults()
    faults.unknown(body, ("github_token", "api_keys"))
    credentials = check_credentials(body, faults)
    if not body:
        faults.add("api_keys", "or github_token must be given")
    faults.check()
    return await change_vm(request, "rotate", credentials)


async def read_webhook(request: web.Request) -> list[tuple[str, str]]:
    """The form of a webhook that Twilio signed for our account; raises Refusal."""
    settings = request.app[SETTINGS]
    raw = await read_body(request, SMS_BODY_BYTES, "application/x-www-form-urlencoded")
    try:
        pairs = parse_form(raw)
    except ValueError:
        raise Refusal("malformed", "the body is not a form in UTF-8") from None
    header = request.headers.get("X-Twilio-Signature")
    url = settings.public_url + request.raw_path
    # A webhook signed with a SharedKey names it in this header; none is configured here.
    if "X-Twilio-Webhooks-Signature-Settings" in request.headers or not any([is_signed(token, url, pairs, header) for token in settings.twilio_auth_tokens]):
        raise Refusal("bad_signature", "not signed by Twilio for this URL; PUBLIC_URL must be the origin that Twilio calls, TWILIO_AUTH_TOKEN the account's")
    if ("AccountSid", settings.twilio_account_sid) not in pairs:
        raise Refusal("bad_signature", "signed, but for another account than TWILIO_ACCOUNT_SID")
    return pairs


class EmptyTwiml(web.StreamResponse):
    """TwiML that says nothing, for a caller who stays connected: written as it is, which spares a twentieth of all work per text."""

    keep_alive = True
    _head = f"HTTP/1.1 200 OK\r\nContent-Type: {XML_HEADERS['Content-Type']}\r\nContent-Length: {len(EMPTY_TWIML)}\r\nX-Request-Id: "

    def __init__(self, burst: Burst) -> None:
        super().__init__()
        self._burst = burst

    async def prepare(self, request: web.BaseRequest) -> None:
        transport: Any = request.transport
        if transport is None:
            raise ConnectionResetError("the caller is gone")
        self._burst.add(transport, f"{self._head}{self.headers['X-Request-Id']}\r\nDate: {rfc822_formatted_time()}\r\n\r\n{EMPTY_TWIML}".encode())

    async def write_eof(self, data: bytes = b"") -> None:
        await asyncio.sleep(0)  # until it is written: the next request of the same connection must not be answered before


async def post_sms(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    message = parse_inbound(await read_webhook(request), gateway.clock.now())
    say = await gateway.relay.accept(message)
    if not say and request.version == aiohttp.HttpVersion11 and request.keep_alive:
        return EmptyTwiml(gateway.burst)
    return web.Response(body=twiml(say).encode(), headers=XML_HEADERS)


async def post_sms_status(request: web.Request) -> web.Response:
    fields = dict(reversed(await read_webhook(request)))
    await request.app[GATEWAY].relay.on_status(fields, request.query)
    return web.Response(status=204)


def require_vm(request: web.Request) -> tuple[str, Route]:
    """The phone and route of the VM whose token this request carries; raises Refusal."""
    gateway, given = request.app[GATEWAY], bearer_of(request).encode("utf-8", "surrogateescape")
    vm_id = given.partition(b".")[0].decode("utf-8", "replace")
    matches = [hmac.compare_digest(vm_token(root, vm_id).encode(), given) for root in gateway.settings.secrets]
    found = gateway.store.find(vm_id) if any(matches) else None
    if found is None or found[1].vm_id != vm_id or found[1].state in ("failed", "deleting"):
        raise Refusal("unauthorized", "send this VM's COCKPIT_TOKEN as `Authorization: Bearer TOKEN`; it is refused once the VM is gone", headers={"WWW-Authenticate": "Bearer"})
    return found


async def post_messages(request: web.Request) -> web.Response:
    """A VM texts its own owner, unasked."""
    (phone, route), faults = require_vm(request), Faults()
    body = await read_json(request, MESSAGE_BODY_BYTES)
    faults.unknown(body, ("text", "images"))
    words, given = body.get("text", ""), body.get("images", [])
    if not isinstance(words, str):
        faults.add("text", "must be a text")
    paths = [image.get("url") if isinstance(image, dict) else image for image in given] if isinstance(given, list) else [None]
    if len(paths) > MAX_IMAGES or not all(isinstance(path, str) and IMAGE_PATH.fullmatch(path) for path in paths):
        faults.add("images", f'must be at most {MAX_IMAGES} images of this VM, such as [{{"url": "/images/chart.png"}}]')
    faults.check()
    if not (words := clean_text(words).strip("\n")).strip() and not paths:
        faults.add("text", "must hold something to say, unless there are images")
        faults.check()
    message = await request.app[GATEWAY].relay.say_unasked(route.vm_id, phone, words if words.strip() else "", tuple(map(str, paths)))
    return json_response({"id": message}, status=202)


async def get_media(request: web.Request) -> web.StreamResponse:
    """An image of a VM for Twilio to fetch, or a phone's picture for its VM: whoever holds the link may read it."""
    gateway = request.app[GATEWAY]
    vm_id, what = read_link(request.match_info["signed"], gateway.settings.secrets, gateway.clock.now())
    found = gateway.store.find(vm_id)
    if found is None or found[1].state in ("failed", "deleting"):
        raise Refusal("not_found", "the VM that this link is about is gone")
    is_image = IMAGE_PATH.fullmatch(what) is not None
    response = web.StreamResponse(headers={"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'", "Cache-Control": "private"})
    try:
        async with gateway.vms.open_image(found[1], what) if is_image else gateway.twilio.open_media(what) as source:
            await pass_on(request, source, response, pictures_only=is_image)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        if not response.prepared:
            raise Refusal("vm_unreachable", "the image cannot be fetched just now; try again in a minute") from error
        log_event("media_cut", level=logging.WARNING, vm_id=vm_id, error=type(error).__name__)
        if request.transport is not None:
            request.transport.abort()  # the only way to tell that it is not whole
    return response


async def pass_on(request: web.Request, source: aiohttp.ClientResponse, response: web.StreamResponse, *, pictures_only: bool) -> None:
    """Stream what is fetched, at most 5 MB of it, as what its first bytes say it is; raises Refusal when there is nothing to show."""
    size = source.content_length
    if source.status != HTTPStatus.OK or "Content-Encoding" in source.headers or (size or 0) > MAX_IMAGE_BYTES:
        raise Refusal("not_found", "there is no such image, or it is larger than 5 MB")
    chunk = b""
    while len(chunk) < 8 and (more := await source.content.readany()):
        chunk += more
    kind = next((kind for start, kind in PICTURES.items() if chunk.startswith(start)), "")
    if not kind and pictures_only:
        raise Refusal("not_found", "this is not a PNG, JPEG or GIF image")
    response.content_type, response.content_length = kind or "application/octet-stream", size
    await response.prepare(request)
    sent = 0
    while chunk and request.method != "HEAD":
        sent += len(chunk)
        if sent > MAX_IMAGE_BYTES:
            raise aiohttp.ClientPayloadError("larger than 5 MB")
        await response.write(chunk)
        chunk = await source.content.readany()


def vms_by_state(gateway: Gateway) -> dict[str, int]:
    """How many VMs there are in each state."""
    known, away = gateway.store.states, gateway.relay.away_count()
    return {"ready": max(0, known["ready"] - away), "away": away, "provisioning": known["provisioning"], "deleting": len(gateway.store.undo), "failed": known["failed"]}


def troubles_of(gateway: Gateway) -> list[str]:
    """What is not well, in words, without numbers of phones."""
    troubles = [words for words in (gateway.store.trouble, gateway.journal.trouble, gateway.twilio.trouble, gateway.fly.trouble, gateway.provisioner.closed) if words] + gateway.fleet.troubles
    if gateway.store.undo:
        troubles.append(f"{len(gateway.store.undo)} VMs are being deleted; Fly has not confirmed yet")
    return troubles


async def get_metrics(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    if gateway.settings.metrics_token and not is_bearer(request, [gateway.settings.metrics_token]):
        raise Refusal("unauthorized", "send METRICS_TOKEN as `Authorization: Bearer TOKEN`", headers={"WWW-Authenticate": "Bearer"})
    relay = gateway.relay
    gauges: list[tuple[str, str, str, Mapping[str, float]]] = [
        ("vms", "VMs by state.", "state", vms_by_state(gateway)),
        ("texts_waiting", "Texts accepted and not yet finished.", "", {"": relay.waiting()}),
        ("oldest_waiting_seconds", "Age of the text that waits longest.", "", {"": relay.oldest_waiting_s()}),
        ("pool", "Machines of the pool by state.", "state", Counter(str(entry.get("state")) for entry in gateway.store.pool.values())),
        ("journal_bytes", "Size of the journal.", "", {"": gateway.journal.size}),
        ("troubles", "Troubles that /health names.", "", {"": len(troubles_of(gateway))}),
        ("draining", "1 while shutting down.", "", {"": relay.draining}),
    ]
    return web.Response(text=gateway.metrics.expose(gauges), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "Cache-Control": "no-store"})


async def get_message(request: web.Request) -> web.Response:
    require_key(request)
    trace = request.app[GATEWAY].relay.traces.get(request.match_info["sid"])
    if trace is None:
        raise Refusal("not_found", f"no text with this SID among the last {TRACES_KEPT} since this gateway started")
    return json_response(trace.to_json())


async def get_health(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    body = {"status": "draining" if gateway.relay.draining else "ok", "vms": {state: count for state, count in vms_by_state(gateway).items() if count},
            "waiting": gateway.relay.waiting(), "troubles": troubles_of(gateway)}
    if gateway.store.pool:
        body["pool"] = Counter(str(entry.get("state")) for entry in gateway.store.pool.values())
    return json_response(body, status=503 if gateway.relay.draining else 200)


# --- Operator's page ---

ROWS = 200  # of the table, at a time
TICK_S = 2.0
SCAN_SHARE = 20.0  # sorting or filtering a large fleet may take one part in this many of the process's time
SCAN_STEP = 100
NUMERIC_COLUMNS = ("waiting", "last_text", "away_since")
COLUMNS = ("vm_id", "state", "region", "image", *NUMERIC_COLUMNS, "last_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Which rows of the fleet an operator looks at; `after` is the sort value and vm_id of the row before them."""

    sort: str = "vm_id"
    descending: bool = False
    needle: str = ""
    after: tuple[Any, str] | None = None

    @property
    def is_plain(self) -> bool:
        return self.sort == "vm_id" and not self.descending and not self.needle

    def rank(self, row: Json) -> tuple[Any, str]:
        return row[self.sort] or (0 if self.sort in NUMERIC_COLUMNS else ""), row["vm_id"]

    def first(self, rows: Iterable[Json]) -> list[Json]:
        """The rows of this page, and one more if there are more."""
        behind = [row for row in rows if self.after is None or (self.rank(row) < self.after if self.descending else self.rank(row) > self.after)]
        return (heapq.nlargest if self.descending else heapq.nsmallest)(ROWS + 1, behind, key=self.rank)


def parse_view(query: Mapping[str, str]) -> View:
    """Raises Refusal naming what is not a view."""
    faults, after = Faults(), None
    sort = query.get("sort", "vm_id")
    if sort not in COLUMNS:
        faults.add("sort", f"must be one of {', '.join(COLUMNS)}")
    if raw := query.get("after"):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            value, vm_id = json.loads(raw)
            if isinstance(vm_id, str) and (type(value) in (int, float) if sort in NUMERIC_COLUMNS else isinstance(value, str)):
                after = (value, vm_id)
        if after is None:
            faults.add("after", "must be the `next` of the page before")
    faults.check()
    return View(sort=sort, descending=query.get("desc") == "1", needle=query.get("filter", "").strip().lower()[:100], after=after)


def row_of(gateway: Gateway, vm_id: str) -> tuple[Json, str] | None:
    """One VM as the table shows it, and the words a filter finds it by (its whole number too); None when it is gone."""
    try:
        record = show(gateway, gateway.provisioner.look_up(vm_id))
    except Refusal:
        return None
    row = {name: record[name] or "" for name in ("vm_id", "state", "step", "region", "image", "last_error")}
    row |= {"phone": mask_phone(record["phone_number"]), "waiting": gateway.relay.waiting(vm_id), "last_text": gateway.relay.last_texts.get(vm_id),
            "away_since": gateway.relay.away_since(vm_id)}
    return row, " ".join([record["phone_number"], *(str(row[name]) for name in ("phone", "vm_id", "state", "region", "image", "last_error"))]).lower()


async def pick_rows(gateway: Gateway, view: View) -> Json:
    """A page of the table. In plain order it costs its own rows only; otherwise the fleet is gone through a little at a time."""
    store, best, matching = gateway.store, list[Json](), 0
    vm_ids = vm_ids_after(store, view.after[1] if view.after else "", ROWS + 1) if view.is_plain else vm_ids_after(store, "", sys.maxsize)
    for start in range(0, len(vm_ids), SCAN_STEP):
        rows = [found[0] for vm_id in vm_ids[start:start + SCAN_STEP] if (found := row_of(gateway, vm_id)) and view.needle in found[1]]
        matching += len(rows)
        best = view.first(best + rows)
        await gateway.clock.sleep(0)
    if view.is_plain:
        matching = sum(vms_by_state(gateway).values())
    return {"rows": best[:ROWS], "matching": matching, "next": dump(list(view.rank(best[ROWS - 1]))) if len(best) > ROWS else None}


def sum_up(gateway: Gateway) -> Json:
    """What the page's tiles, chart and notes show."""
    settings, metrics, relay = gateway.settings, gateway.metrics, gateway.relay
    return {"at": gateway.clock.now(), "mode": "production" if settings.production else "local", "number": mask_phone(settings.twilio_phone_number),
            "has_phone": settings.twilio_is_local, "can_kill": settings.fly_is_local, "regions": settings.vm_regions, "vms": vms_by_state(gateway), "pool": len(gateway.store.pool),
            "texts_a_minute": round(metrics.texts_a_minute(), 1), "median_s": metrics.quantile(0.5), "p99_s": metrics.quantile(0.99), "waiting": relay.waiting(),
            "oldest_s": relay.oldest_waiting_s(), "hour": metrics.last_hour(), "troubles": troubles_of(gateway)}


async def get_events(request: web.Request) -> web.StreamResponse:
    """The page's live feed: `fleet` every 2 s, `table` when it changed; both once, as JSON, for who does not accept a stream."""
    require_key(request)
    gateway, view = request.app[GATEWAY], parse_view(request.query)
    if "text/event-stream" not in request.headers.get("Accept", "").lower():
        return json_response({"fleet": sum_up(gateway), "table": await pick_rows(gateway, view)})
    response, shown, scan_at = event_stream(), b"", float("-inf")
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        while not gateway.relay.draining:
            await response.write(server_sent("fleet", sum_up(gateway)))
            if (began := gateway.clock.monotonic()) >= scan_at:
                table = server_sent("table", await pick_rows(gateway, view))
                scan_at = began + (gateway.clock.monotonic() - began) * SCAN_SHARE
                if table != shown:
                    await response.write(shown := table)
            await gateway.clock.sleep(TICK_S)
    return response


async def get_page(request: web.Request) -> web.Response:
    hint = "In local mode it is: local" if "local" in request.app[SETTINGS].api_keys else "It is what COCKPIT_API_KEY holds where this gateway runs."
    return web.Response(text=PAGE.replace("{hint}", hint), content_type="text/html", headers=PAGE_HEADERS)


PAGE_STYLE = r"""
:root{color-scheme:light dark;--bg:#f5f6f8;--card:#fff;--ink:#16191f;--dim:#5f6875;--line:#e3e6eb;--soft:#eef0f4;--go:#2457d6;--go-ink:#fff;--ok:#137a48;--warn:#985b00;--bad:#c02b38;--bubble:#e7eaf0}
@media(prefers-color-scheme:dark){:root{--bg:#0e1116;--card:#161a21;--ink:#e8ebf0;--dim:#98a2b1;--line:#272d37;--soft:#1e232c;--go:#7da2ff;--go-ink:#0b1020;--ok:#4cc78a;--warn:#e5a94a;--bad:#ff7d87;--bubble:#262c37}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{margin:0;background:var(--bg);color:var(--ink);font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
h1,h2,p,dl,dd,ol,ul{margin:0;padding:0}h2{font-size:15px;font-weight:650}ol,ul{list-style:none}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px}
button,input,select{font:inherit;color:inherit;border:1px solid var(--line);border-radius:8px;background:var(--card);padding:7px 11px;min-width:0}
input,select{width:100%}input::placeholder{color:var(--dim);opacity:.75}
button{flex:none;cursor:pointer;font-weight:550;white-space:nowrap}button:hover{background:var(--soft)}button:disabled{opacity:.45;cursor:default}
button.go{background:var(--go);border-color:var(--go);color:var(--go-ink)}button.go:hover{filter:brightness(1.08)}
button.bad{color:var(--bad)}button.flat{border-color:transparent;background:none;font-weight:500}button.flat:hover{background:var(--soft)}button.small{padding:3px 8px;font-size:13px}
:focus-visible{outline:2px solid var(--go);outline-offset:2px}
.dim{color:var(--dim)}.error{color:var(--bad)}.row{display:flex;gap:8px;align-items:center}.grow{flex:1}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px}
header{display:flex;gap:12px;align-items:center;padding:12px 24px;background:var(--card);border-bottom:1px solid var(--line);position:sticky;top:0;z-index:2}
header h1{font-size:17px;font-weight:700;letter-spacing:-.02em;display:flex;gap:8px;align-items:center}header svg{color:var(--go)}
.badge{font-size:12px;font-weight:600;color:var(--dim);background:var(--soft);border-radius:99px;padding:2px 9px}
#status{display:flex;gap:7px;align-items:center;color:var(--dim);font-size:13px}
#status::before,.state::before{content:"";width:8px;height:8px;border-radius:50%;background:var(--dim);flex:none}#status.live::before{background:var(--ok)}#status.poll::before{background:var(--warn)}#status.lost::before{background:var(--bad)}
#gate{max-width:380px;margin:14vh auto 0;padding:28px}#gate h2{font-size:20px;margin-bottom:4px}#gate form{display:grid;gap:10px;margin-top:18px}
#board{max-width:1560px;margin:0 auto;padding:20px 24px 48px;display:grid;gap:16px;grid-template-columns:minmax(0,1fr)}
#troubles{border-color:var(--warn);padding:10px 16px}#troubles li::before{content:"! ";color:var(--warn);font-weight:700}
#tiles{display:grid;gap:12px;grid-template-columns:repeat(4,minmax(0,1fr)) minmax(280px,1.9fr)}
.tile{padding:13px 16px}.tile dt{color:var(--dim);font-size:13px}.tile dd{font-size:26px;font-weight:650;letter-spacing:-.02em;line-height:1.25}.tile small{display:block;font-size:12.5px;font-weight:400;letter-spacing:0;color:var(--dim);min-height:18px}
#chart{display:block;width:100%;height:56px}#chart .t{fill:var(--go)}#chart .f{fill:var(--bad)}#chart .o{fill:var(--line)}
#work{display:grid;gap:16px;grid-template-columns:minmax(0,1fr);align-items:start}#work.two{grid-template-columns:minmax(0,1fr) 360px}
.bar{display:flex;gap:10px;align-items:center;padding:12px 16px;border-bottom:1px solid var(--line)}.bar input{max-width:280px}
.scroll{overflow-x:auto;border-radius:0 0 11px 11px}table{border-collapse:collapse;width:100%}th{text-align:left;font-weight:500;padding:0}th button{border:0;background:none;color:var(--dim);font-size:12.5px;padding:8px 6px;border-radius:0;width:100%;text-align:left}
th:first-child button,td:first-child{padding-left:16px}th[aria-sort=ascending] button::after{content:" ↑"}th[aria-sort=descending] button::after{content:" ↓"}th[aria-sort] button{color:var(--ink)}
td{padding:9px 6px;border-top:1px solid var(--line);vertical-align:middle}td:last-child{padding-right:12px}td b{font-weight:600;display:block;white-space:nowrap}td .mono{color:var(--dim);white-space:nowrap}
.cut{max-width:170px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}.state{display:inline-flex;gap:7px;align-items:center;white-space:nowrap}tbody tr:hover td{background:color-mix(in srgb,var(--soft) 55%,var(--card))}
.state.ready::before{background:var(--ok)}.state.away::before,.state.deleting::before{background:var(--warn)}.state.failed::before{background:var(--bad)}.state.provisioning::before{background:var(--go);animation:pulse 1.2s infinite}
@keyframes pulse{50%{opacity:.25}}@media(prefers-reduced-motion:reduce){*{animation:none!important}}
td{white-space:nowrap}td.acts{position:sticky;right:0;background:var(--card)}.acts div{display:flex;justify-content:flex-end}.acts button{font-weight:500;padding:3px 6px}.acts button:not(.bad):not(:hover){color:var(--dim)}.none{padding:44px 16px;text-align:center;color:var(--dim)}.none b{display:block;color:var(--ink);font-size:15px;margin-bottom:3px}
.foot{display:flex;gap:8px;align-items:center;padding:10px 16px;border-top:1px solid var(--line);color:var(--dim)}
#phone{display:flex;flex-direction:column;height:clamp(440px,calc(100vh - 222px),720px);position:sticky;top:76px}#phone .bar{padding:12px;gap:8px}#thread{flex:1;overflow-y:auto;padding:14px;display:flex;flex-direction:column;gap:3px}
#thread li{max-width:84%;padding:7px 12px;border-radius:16px;white-space:pre-wrap;overflow-wrap:anywhere;background:var(--bubble);align-self:flex-start}#thread li.in{background:var(--go);color:var(--go-ink);align-self:flex-end}
#thread li.note{background:none;border:1px dashed var(--line);color:var(--dim)}#thread li.none{background:none;align-self:center;color:var(--dim);padding-top:30px}#thread img{display:block;max-width:100%;border-radius:9px;margin:5px 0 3px}
#thread time{display:block;font-size:11px;opacity:.7;margin-top:1px}#thread li.in time{text-align:right}#phone form{display:flex;gap:8px;padding:12px;border-top:1px solid var(--line)}
dialog{border:1px solid var(--line);border-radius:14px;background:var(--card);color:var(--ink);padding:22px;width:min(480px,calc(100vw - 24px));box-shadow:0 20px 60px #0005}dialog::backdrop{background:#0007}
dialog form,.stack{display:grid;gap:13px}label{display:grid;gap:4px;font-weight:550}fieldset{border:0;padding:0;margin:0;min-width:0}legend{padding:0;font-weight:550;margin-bottom:4px}label input,label select{font-weight:400}label .dim,.help{font-weight:400;font-size:12.5px}label.check{display:flex;gap:8px;align-items:center;font-weight:400}label.check input{width:auto}
.pair{display:grid;grid-template-columns:1fr 1.2fr;gap:8px}.ends{display:flex;gap:8px;justify-content:flex-end;margin-top:4px}
#steps{display:grid;gap:1px}#steps li{display:flex;gap:9px;padding:4px 0;color:var(--dim)}#steps li::before{content:"○";width:14px}#steps li.done,#steps li.now{color:var(--ink)}#steps li.done::before{content:"✓";color:var(--ok)}#steps li.now::before{content:"●";color:var(--go);animation:pulse 1.2s infinite}#steps li.bad::before{content:"✕";color:var(--bad)}#steps span{margin-left:auto}
#toast{position:fixed;left:12px;right:12px;margin:auto;width:fit-content;bottom:22px;max-width:min(620px,calc(100vw - 24px));z-index:9;background:var(--ink);color:var(--bg);padding:11px 16px;border-radius:10px;box-shadow:0 8px 30px #0004}
@media(max-width:1400px){#work.two{grid-template-columns:minmax(0,1fr) 326px}.cut{max-width:104px}}
@media(max-width:1180px){#tiles{grid-template-columns:repeat(4,minmax(0,1fr))}#hour{grid-column:1/-1}#work.two{grid-template-columns:minmax(0,1fr)}#phone{position:static;height:520px}}
@media(max-width:720px){header{padding:10px 14px;gap:8px}#number,#mode{display:none}#board{padding:14px 12px 40px;gap:12px}#tiles{grid-template-columns:1fr 1fr;gap:8px}.tile{padding:10px 13px}.tile dd{font-size:22px}
.bar{flex-wrap:wrap}.bar input{max-width:none;flex:1}table,thead,tbody,tr,td{display:block;border:0}thead tr{display:flex;flex-wrap:wrap;padding:0 8px}th:first-child button{padding-left:6px}th[aria-sort] button{font-weight:650}tbody tr{padding:12px 14px;border-top:1px solid var(--line);display:grid;grid-template-columns:1fr 1fr;gap:5px 12px}
td,td:first-child,td:last-child{padding:0}td:empty{display:none}td[data-name]::before{content:attr(data-name);display:block;color:var(--dim);font-size:11.5px}td.acts{position:static;grid-column:1/-1;margin:2px -7px 0}.acts div{justify-content:flex-start}td:first-child::before,td:nth-child(2)::before{display:none!important}.cut{max-width:100%}}
"""

PAGE_BODY = """
<header><h1><svg width="22" height="22" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round" aria-hidden="true"><path d="M3 15a9 9 0 0 1 18 0"/><path d="M12 15l4-5"/><path d="M7 19h10"/></svg>cockpit</h1>
<span id="mode" class="badge" hidden></span><span id="number" class="dim" hidden></span><span class="grow"></span><span id="status" role="status" hidden></span>
<button id="new" class="go" hidden>New VM</button><button id="out" class="flat" hidden>Sign out</button></header>
<main id="gate" class="card"><h2>Sign in</h2><p class="dim">The page keeps the key in this tab only.</p>
<form id="enter"><label>API key<input id="key" type="password" autocomplete="off" required aria-describedby="why hint"></label>
<p id="hint" class="help dim">{hint}</p><p id="why" class="error" role="alert" hidden></p><button class="go">Open</button></form></main>
<main id="board" hidden><ul id="troubles" class="card" aria-label="Troubles" hidden></ul>
<dl id="tiles"><div class="tile card"><dt>VMs</dt><dd><span id="t-vms">–</span><small id="t-states"></small></dd></div>
<div class="tile card"><dt>Texts a minute</dt><dd><span id="t-rate">–</span><small id="t-total"></small></dd></div>
<div class="tile card"><dt>Text to answer</dt><dd><span id="t-median">–</span><small id="t-p99"></small></dd></div>
<div class="tile card"><dt>Waiting</dt><dd><span id="t-waiting">–</span><small id="t-oldest"></small></dd></div>
<div class="tile card" id="hour"><dt id="hour-title">Last hour</dt><dd><svg id="chart" role="img" viewBox="0 0 360 56" preserveAspectRatio="none"></svg></dd></div></dl>
<div id="work"><section class="card" aria-labelledby="fleet"><div class="bar"><h2 id="fleet">VMs</h2><span id="count" class="dim"></span><span class="grow"></span>
<input id="filter" type="search" placeholder="Filter: number, VM, state, image" aria-label="Filter the VMs"></div>
<div class="scroll"><table><thead><tr id="heads"></tr></thead><tbody id="rows"></tbody></table></div><p id="none" class="none" hidden></p>
<div class="foot" id="foot" hidden><span id="range"></span><span class="grow"></span><button id="back" class="small">Previous</button><button id="next" class="small">Next</button></div></section>
<section id="phone" class="card" aria-labelledby="phone-title" hidden><div class="bar"><h2 id="phone-title">Phone</h2><input id="from" list="known" inputmode="tel" aria-label="The phone's number" placeholder="+1 555 010 0199">
<datalist id="known"></datalist><button id="kill" class="small bad" title="End the process of this number's VM">Kill VM</button></div>
<ol id="thread" role="log" aria-label="Texts" tabindex="0"></ol><form id="send"><input id="words" autocomplete="off" maxlength="1600" placeholder="Text your VM" aria-label="Text" required><button class="go">Send</button></form></section></div></main>
<dialog id="make" aria-labelledby="make-title"><form id="order"><h2 id="make-title">New VM</h2>
<label>Phone number<input id="o-phone" inputmode="tel" placeholder="+1 555 010 0199" required></label><label>GitHub token<input id="o-token" type="password" autocomplete="off" required></label>
<fieldset class="stack"><legend>API keys</legend><div id="keys" class="stack"></div><div><button type="button" id="more" class="small flat">+ Another key</button></div></fieldset>
<label>Region<select id="o-region"></select></label><label class="check"><input id="o-welcome" type="checkbox" checked>Text a welcome when it is ready</label>
<p id="o-error" class="error" role="alert" hidden></p><div class="ends"><button type="button" class="flat" data-close>Cancel</button><button class="go">Set up</button></div></form>
<div id="progress" class="stack" hidden><h2 id="p-title" role="status"></h2><ol id="steps"></ol><p id="p-words" role="status"></p><div class="ends"><button id="p-again" class="flat" hidden>Change and try again</button><button class="go" data-close>Close</button></div></div></dialog>
<dialog id="ask" aria-labelledby="ask-title" aria-describedby="ask-words"><form method="dialog"><h2 id="ask-title"></h2><p id="ask-words"></p><div class="ends"><button class="flat" value="">Cancel</button><button id="ask-yes" class="go" value="yes"></button></div></form></dialog>
<div id="toast" role="status" hidden></div>
"""

PAGE_SCRIPT = r"""
'use strict';
const $ = id => document.getElementById(id), sleep = ms => new Promise(done => setTimeout(done, ms)), plural = (n, word) => `${n.toLocaleString('en')} ${word}${n === 1 ? '' : 's'}`;
// Words from outside only ever become text: this page has no way to make markup of them.
const h = (tag, given = {}, ...kids) => { const made = Object.assign(document.createElement(tag), given); made.append(...kids); return made; };
const say = (node, words) => { if (node.textContent !== words) node.textContent = words; };
const HEADS = [['vm_id', 'VM'], ['state', 'State'], ['region', 'Region'], ['image', 'Image'], ['waiting', 'Waiting'], ['last_text', 'Last text'], ['away_since', 'Away since'], ['last_error', 'Last error']];
const STEPS = {app: 'Create the app', secrets: 'Store the credentials', address: 'Allocate an address', volume: 'Create the volume, if it has one', machine: 'Create the machine', start: 'Start it', health: 'Wait for its /health'};
const REMEDY = {unauthorized: 'Sign in with the key that COCKPIT_API_KEY holds now.', too_many: 'Wait a few seconds, then try again.', vm_limit: 'Tear one down, or raise VM_LIMIT.',
  storage: 'Check the disk that ROUTES_FILE is on.', fly_rejected: 'Check FLY_API_TOKEN and FLY_ORG; python cockpit.py doctor says more.', fly_unavailable: 'Fly may be having trouble: try again in a minute.',
  no_capacity: 'Choose another region, or try again later.', vm_unhealthy: 'Check VM_IMAGE: it must answer GET /health on port 3000.', draining: 'The gateway is restarting: try again in a moment.',
  phone_taken: 'Tear that VM down first if you want a new one.', unknown_vm: 'It was torn down meanwhile.', wrong_state: 'Wait until it is ready.', internal: 'The gateway\u2019s log says what happened.'};
const FIELDS = {phone_number: 'The phone number', github_token: 'The GitHub token', api_keys: 'The API keys', region: 'The region'};
let key = sessionStorage.getItem('cockpit-key') || '', feed = 0, stop = null, fleet = null, fleetAt = 0, table = null, toastTimer = 0;
const view = {sort: 'vm_id', desc: false, filter: '', trail: []}, drawn = new Map();

// Talking to the gateway

async function api(path, {headers, ...rest} = {}) {
  const answer = await fetch(path, {...rest, cache: 'no-store', headers: {Authorization: 'Bearer ' + key, ...headers}});
  if (answer.ok) return answer;
  let told = {}; try { told = await answer.json(); } catch { /* not our own words: the status must do */ }
  throw Object.assign(new Error(told.detail || `the gateway answered ${answer.status}`), {status: answer.status, problem: told});
}
const post = (path, body, headers = {}) => api(path, {method: 'POST', body: JSON.stringify(body), headers: {'Content-Type': 'application/json', ...headers}});
function explain(error) {
  if (!error.status) return 'The gateway did not answer. Check that it is running and that you are connected, then try again.';
  const faults = (error.problem.errors || []).map(fault => `${FIELDS[fault.field] || fault.field.replace('api_keys.', '')} ${fault.message}`).join('; ');
  const words = faults || error.message, remedy = REMEDY[error.problem.code] || '';
  return words[0].toUpperCase() + words.slice(1) + '. ' + remedy;
}
function toast(words) { say($('toast'), words); $('toast').hidden = false; clearTimeout(toastTimer); toastTimer = setTimeout(() => { $('toast').hidden = true; }, 7000); }
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader(); let text = '';
  for (;;) {
    const {value, done} = await reader.read(); if (done) return;
    const blocks = (text += value).split('\n\n'); text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split('\n'), part = name => lines.filter(line => line.startsWith(name + ': ')).map(line => line.slice(name.length + 2)).join('\n');
      if (part('data')) yield [part('event'), JSON.parse(part('data'))];
    }
  }
}
function status(kind, words) { $('status').className = kind; say($('status'), words); }
function query() { return new URLSearchParams({sort: view.sort, desc: view.desc ? 1 : 0, filter: view.filter, ...(view.trail.length ? {after: view.trail.at(-1)} : {})}); }
async function follow() {  // a stream; where that does not get through, polling, with a stream tried now and then
  const mine = ++feed; let failures = 0; if (stop) stop.abort();
  while (mine === feed && key) {
    const streaming = failures < 3 || failures % 6 === 0, cut = stop = new AbortController(); let guard = 0, polled = false;
    const alive = () => { clearTimeout(guard); guard = setTimeout(() => cut.abort(), 15000); };
    try {
      alive();
      const answer = await api('events?' + query(), {signal: cut.signal, headers: {Accept: streaming ? 'text/event-stream' : 'application/json'}});
      if (streaming) for await (const [name, told] of eventsOf(answer)) { if (mine !== feed) return; alive(); failures = 0; status('live', 'Live'); take(name, told); }
      else { const told = await answer.json(); if (mine !== feed) return; take('fleet', told.fleet); take('table', told.table); polled = true; status('poll', 'Live, every 5 s'); }
    } catch (error) {
      if (mine !== feed) return;
      if (error.status === 401) return leave('That key is not accepted. ' + REMEDY.unauthorized);
      if (error.status === 422) { view.trail = []; toast(explain(error)); }
    } finally { clearTimeout(guard); }
    failures++;
    const pause = polled ? 5 : Math.min(30, 2 ** (failures - 1)) * (0.5 + Math.random() / 2);
    if (!polled) status('lost', `No connection, trying again in ${Math.ceil(pause)} s`);
    await sleep(pause * 1000);
  }
}
function take(name, told) {
  if (name === 'fleet') { fleet = told; fleetAt = performance.now(); drawFleet(); } else if (name === 'table') { table = told; drawTable(); }
}

// Signing in

function enter() {
  for (const id of ['new', 'out', 'status', 'board', 'mode', 'number']) $(id).hidden = false;
  $('gate').hidden = true; status('', 'Connecting'); follow();
}
function leave(why = '') {
  feed++; if (stop) stop.abort(); key = ''; sessionStorage.removeItem('cockpit-key');
  for (const id of ['new', 'out', 'status', 'board', 'mode', 'number', 'phone']) $(id).hidden = true;
  document.querySelectorAll('dialog[open]').forEach(open => open.close());
  $('gate').hidden = false; say($('why'), why); $('why').hidden = !why; $('key').value = ''; $('key').focus();
}
$('enter').onsubmit = async event => {
  event.preventDefault(); key = $('key').value.trim();
  try {
    if (!/^[\x21-\x7e]+$/.test(key)) throw Object.assign(new Error(), {status: 401});
    await api('provision?limit=1'); sessionStorage.setItem('cockpit-key', key); enter(); $('new').focus();
  } catch (error) { leave(error.status === 401 ? 'That key is not accepted. ' + REMEDY.unauthorized : explain(error)); }
};
$('out').onclick = () => leave();

// Tiles and chart

const clockNow = () => fleet.at + (performance.now() - fleetAt) / 1000;
function span(seconds) {
  if (seconds < 1) return Math.round(seconds * 1000) + ' ms';
  if (seconds < 10) return seconds.toFixed(1) + ' s';
  for (const [size, unit] of [[86400, 'd'], [3600, 'h'], [60, 'min']]) if (seconds >= size) return Math.floor(seconds / size) + ' ' + unit;
  return Math.round(seconds) + ' s';
}
const ago = at => !at ? '' : clockNow() - at < 2 ? 'now' : span(Math.round(clockNow() - at)).replace('.0', '') + ' ago';
function drawFleet() {
  const vms = Object.entries(fleet.vms), total = vms.reduce((sum, [, n]) => sum + n, 0), texts = fleet.hour.reduce((sum, [n]) => sum + n, 0), failed = fleet.hour.reduce((sum, [, n]) => sum + n, 0);
  say($('mode'), fleet.mode); say($('number'), fleet.number); say($('t-vms'), total.toLocaleString('en'));
  say($('t-states'), [...vms, ['in the pool', fleet.pool]].filter(([, n]) => n).map(([state, n]) => `${n} ${state}`).join(' · ') || 'none yet');
  say($('t-rate'), fleet.texts_a_minute.toLocaleString('en')); say($('t-total'), `${texts.toLocaleString('en')} in the last hour`);
  say($('t-median'), fleet.median_s === null ? '–' : span(fleet.median_s)); say($('t-p99'), fleet.median_s === null ? 'no answers yet' : `median; p99 ${span(fleet.p99_s)}`);
  say($('t-waiting'), fleet.waiting.toLocaleString('en')); say($('t-oldest'), fleet.waiting ? `oldest ${span(fleet.oldest_s)}` : 'nothing waits');
  say($('hour-title'), `Last hour: ${plural(texts, 'text')}, ${plural(failed, 'failure')}`); $('chart').setAttribute('aria-label', $('hour-title').textContent);
  const most = Math.max(8, ...fleet.hour.map(([n, bad]) => Math.max(n, bad)));
  $('chart').replaceChildren(...fleet.hour.flatMap(([n, bad], at) => [[n, 't'], [bad, 'f']].filter(([count, kind]) => count || kind === 't').map(([count, kind]) => {
    const bar = document.createElementNS('http://www.w3.org/2000/svg', 'rect'), high = count ? Math.max(3, count / most * 56) : 1.5;
    for (const [name, value] of Object.entries({x: at * 6 + 0.6, y: 56 - high, width: 4.8, height: high, rx: 1, class: count ? kind : 'o'})) bar.setAttribute(name, value);
    return bar;
  })));
  $('troubles').hidden = !fleet.troubles.length; $('troubles').replaceChildren(...fleet.troubles.map(words => h('li', {}, words)));
  $('work').className = fleet.has_phone ? 'two' : ''; $('kill').hidden = !fleet.can_kill;
  if (fleet.has_phone && $('phone').hidden) { $('phone').hidden = false; openPhone(); }
  if (!$('o-region').length) $('o-region').append(h('option', {value: ''}, `As configured (${fleet.regions.join(', ')})`), ...fleet.regions.map(code => h('option', {value: code}, code)));
}

// Table

for (const [name, title] of HEADS) $('heads').append(h('th', {scope: 'col', id: 'h-' + name}, h('button', {onclick: () => {
  view.desc = view.sort === name ? !view.desc : ['waiting', 'last_text', 'away_since'].includes(name); view.sort = name; view.trail = []; drawHeads(); follow();
}}, title)));
$('heads').append(h('th', {scope: 'col'}));
function drawHeads() { for (const [name] of HEADS) name === view.sort ? $('h-' + name).setAttribute('aria-sort', view.desc ? 'descending' : 'ascending') : $('h-' + name).removeAttribute('aria-sort'); }
function newRow(row) {
  const cells = HEADS.map(([, title], at) => { const cell = h('td'); if (at) cell.dataset.name = title; return cell; });
  cells[0].append(h('b', {}, row.phone), h('span', {className: 'mono'}, row.vm_id)); cells[1].append(h('span', {className: 'state'}));
  cells[3].className = 'mono cut'; cells[7].className = 'cut error';
  const act = (title, how, kind = '') => h('button', {className: 'small flat ' + kind, ariaLabel: `${title} ${row.phone}`, onclick: () => how(row)}, title);
  return h('tr', {}, ...cells, h('td', {className: 'acts'}, h('div', {}, act('Restart', restart), act('Upgrade', upgrade), act('Tear down', tearDown, 'bad'))));
}
function drawTable() {
  const seen = new Set(table.rows.map(row => row.vm_id));
  for (const [vmId, line] of drawn) if (!seen.has(vmId)) { line.remove(); drawn.delete(vmId); }
  table.rows.forEach((row, at) => {
    if (!drawn.has(row.vm_id)) drawn.set(row.vm_id, newRow(row));
    const line = drawn.get(row.vm_id), cells = line.cells, state = cells[1].firstChild;
    if ($('rows').children[at] !== line) $('rows').insertBefore(line, $('rows').children[at] || null);
    state.className = 'state ' + row.state; say(state, row.step ? `${row.state}: ${row.step}` : row.state);
    say(cells[2], row.region); say(cells[3], row.image.split('/').pop()); cells[3].title = row.image; say(cells[4], row.waiting ? String(row.waiting) : ''); say(cells[5], ago(row.last_text));
    say(cells[6], ago(row.away_since)); say(cells[7], row.last_error); cells[7].title = row.last_error;
    for (const button of cells[8].firstChild.children) button.disabled = button.textContent !== 'Tear down' && !['ready', 'away'].includes(row.state);
  });
  const first = view.trail.length * 200, many = first || table.next;
  say($('count'), view.filter ? `${table.matching.toLocaleString('en')} found` : ''); $('foot').hidden = !many; $('none').hidden = table.rows.length > 0;
  say($('range'), `${(first + 1).toLocaleString('en')}–${(first + table.rows.length).toLocaleString('en')} of ${table.matching.toLocaleString('en')}`); $('back').disabled = !first; $('next').disabled = !table.next;
  $('none').replaceChildren(...(view.filter ? ['No VM matches this filter.'] : [h('b', {}, 'No VMs yet'), 'New VM sets one up for a phone number.']));
}
$('next').onclick = () => { view.trail.push(table.next); follow(); };
$('back').onclick = () => { view.trail.pop(); follow(); };
let typing = 0;
$('filter').oninput = () => { clearTimeout(typing); typing = setTimeout(() => { view.filter = $('filter').value.trim(); view.trail = []; follow(); }, 250); };
setInterval(() => { if (key && table && fleet) drawTable(); }, 1000);

// Doing something to a VM: ask, do, say how it went

function ask(title, words, yes, kind) {
  say($('ask-title'), title); say($('ask-words'), words); say($('ask-yes'), yes); $('ask-yes').className = kind; $('ask').returnValue = ''; $('ask').showModal();
  return new Promise(done => { $('ask').onclose = () => done($('ask').returnValue === 'yes'); });
}
async function change(row, title, words, yes, kind, call, done) {
  if (!await ask(title, words, yes, kind)) return;
  toast(`${row.phone}: ${yes.toLowerCase()} is under way`);
  try { const answer = await call(); toast(`${row.phone}: ${answer.status === 202 && kind ? 'Fly has not confirmed yet; it is tried until it has.' : done}`); follow(); } catch (error) { toast(`${row.phone}: ${explain(error)}`); }
}
const restart = row => change(row, `Restart ${row.phone}?`, 'What runs on it now is cut off and handed over again when it is back. Texts wait.', 'Restart', 'go', () => post(`provision/${row.vm_id}/restart`, {}), 'restarted.');
const upgrade = row => change(row, `Upgrade ${row.phone}?`, 'Moves it to the present VM_IMAGE, and back to the old one if that does not answer. Texts wait.', 'Upgrade', 'go', () => post(`provision/${row.vm_id}/upgrade`, {}), 'runs the present image.');
const tearDown = row => change(row, `Tear down ${row.phone}?`, `Destroys ${row.vm_id} with its machine and disk, and frees the number. What waits is not run; its owner is told. This cannot be undone.`, 'Tear down', 'bad',
  () => api(`provision/${row.vm_id}`, {method: 'DELETE'}), 'torn down.');

// Setting one up

function addKey(name = '') {
  $('keys').append(h('div', {className: 'pair'}, h('input', {value: name, placeholder: 'NAME', ariaLabel: 'Name of the variable', className: 'mono'}), h('input', {type: 'password', autocomplete: 'off', placeholder: 'value', ariaLabel: 'Value of the variable'})));
}
addKey('ANTHROPIC_API_KEY'); $('more').onclick = () => { addKey(); $('keys').lastChild.firstChild.focus(); };
function showOrder() { $('order').hidden = false; $('progress').hidden = true; $('o-error').hidden = true; if (!$('make').open) $('make').showModal(); $('o-phone').focus(); }
$('new').onclick = showOrder; $('p-again').onclick = showOrder;
for (const button of document.querySelectorAll('[data-close]')) button.onclick = () => $('make').close();
$('order').onsubmit = async event => {
  event.preventDefault();
  const pairs = [...$('keys').children].map(pair => [pair.firstChild.value.trim(), pair.lastChild.value]).filter(([name, value]) => name || value);
  const body = {phone_number: $('o-phone').value.trim(), github_token: $('o-token').value, api_keys: Object.fromEntries(pairs), welcome: $('o-welcome').checked, ...($('o-region').value ? {region: $('o-region').value} : {})};
  let answer; $('order').lastElementChild.lastElementChild.disabled = true;
  try { answer = await post('provision', body, {Accept: 'text/event-stream'}); } catch (error) { say($('o-error'), explain(error)); $('o-error').hidden = false; return; } finally { $('order').lastElementChild.lastElementChild.disabled = false; }
  $('order').hidden = true; $('progress').hidden = false; $('p-again').hidden = true; say($('p-title'), `Setting up ${body.phone_number}`); say($('p-words'), '');
  const lines = new Map(Object.entries(STEPS).map(([step, title]) => [step, h('li', {}, title, h('span', {className: 'dim'}))])); $('steps').replaceChildren(...lines.values());
  let began = performance.now(), now = lines.get('app'); now.className = 'now';
  const tick = setInterval(() => now && say(now.lastChild, ((performance.now() - began) / 1000).toFixed(1) + ' s'), 100), all = performance.now();
  try {
    for await (const [name, told] of (answer.headers.get('Content-Type') || '').includes('json') ? [['ready', await answer.json()]] : eventsOf(answer)) {
      if (name === 'step' && lines.has(told.step)) { now = lines.get(told.step); now.className = 'done'; say(now.lastChild, told.seconds.toFixed(told.seconds < 1 ? 3 : 1) + ' s'); now = now.nextElementSibling; began = performance.now(); if (now) now.className = 'now'; }
      if (name === 'ready') {
        now = null; for (const line of lines.values()) line.className = 'done';
        say($('p-title'), `${body.phone_number} is ready`); say($('p-words'), `${told.vm_id} in ${told.region || 'its region'}, after ${span((performance.now() - all) / 1000)}. Its phone can text now.`);
        $('o-token').value = ''; $('o-phone').value = ''; for (const pair of $('keys').children) pair.lastChild.value = ''; if (!$('phone').hidden) { $('from').value = body.phone_number; openPhone(); } follow();
      }
      if (name === 'failed') throw Object.assign(new Error(told.detail), {status: told.status, problem: told});
    }
    if (now) throw new Error();
  } catch (error) {
    if (now) now.className = 'bad'; say($('p-title'), `${body.phone_number} could not be set up`); $('p-again').hidden = false;
    say($('p-words'), error.status ? `${explain(error)} What was made is being undone.` : 'The connection broke. The gateway goes on by itself: the table shows how it ends.');
  } finally { clearInterval(tick); }
};

// The phone, in local mode

let threadTimer = 0, threadShown = '', vmOf = new Map();
const number = () => $('from').value.replace(/[ .()-]/g, '');
async function openPhone() {
  try { const told = await (await api('provision?limit=200')).json(); vmOf = new Map(told.vms.map(vm => [vm.phone_number, vm.vm_id])); } catch { /* the live feed says what is wrong */ }
  $('known').replaceChildren(...[...vmOf.keys()].map(value => h('option', {value}))); if (!$('from').value) $('from').value = [...vmOf.keys()][0] || '';
  clearTimeout(threadTimer); readThread();
}
async function readThread() {
  clearTimeout(threadTimer); const phone = number(), old = threadShown;
  try {
    const texts = phone ? (await (await api('_local/texts?phone=' + encodeURIComponent(phone))).json()).texts : [], said = JSON.stringify([phone, texts]);
    if (said !== threadShown && phone === number()) { threadShown = said; drawThread(phone, texts, !old.startsWith(JSON.stringify([phone]).slice(0, -1))); }
  } catch { /* tried again */ }
  if (key && !$('phone').hidden) { clearTimeout(threadTimer); threadTimer = setTimeout(readThread, document.hidden ? 5000 : 800); }
}
function drawThread(phone, texts, anew) {
  const list = $('thread'), atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60; if (anew) list.replaceChildren();
  if (!texts.length) { list.replaceChildren(h('li', {className: 'none'}, phone ? 'No texts yet. Say hello.' : 'Type the number of a phone above.')); return; }
  if (list.firstChild && list.firstChild.className === 'none') list.replaceChildren();
  for (const text of texts.slice(list.children.length)) {
    const when = new Date(text.at), pictures = text.media.map(url => { const at = new URL(url, location); return h('img', {src: at.pathname + at.search, alt: 'Picture from the VM', onload: () => { list.scrollTop = list.scrollHeight; }}); });
    const note = text.direction === 'out' && /^(Your VM |Not run|No answer after|Still working)/.test(text.body);
    list.append(h('li', {className: text.direction === 'in' ? 'in' : note ? 'note' : ''}, text.body, ...pictures, h('time', {dateTime: when.toISOString()}, when.toLocaleTimeString([], {hour: '2-digit', minute: '2-digit', second: '2-digit'}))));
  }
  if (atEnd || anew) list.scrollTop = list.scrollHeight;
}
$('from').onchange = openPhone;
$('send').onsubmit = async event => {
  event.preventDefault(); const body = $('words').value; if (!number()) { toast('Type the phone\u2019s number first, such as +1 555 010 0199.'); $('from').focus(); return; }
  $('words').value = '';
  try {
    const told = await (await post('_local/texts', {from: number(), body})).json();
    if (told.webhook_status !== 200) toast(`The gateway answered this text with ${told.webhook_status}. ${told.webhook_status === 503 ? REMEDY.storage : 'Its log says why.'}`);
  } catch (error) { $('words').value = body; toast(explain(error)); }
  await readThread(); $('words').focus();
};
$('kill').onclick = async () => {
  await openPhone(); const vmId = vmOf.get(number()); if (!vmId) { toast('This number has no VM. New VM sets one up.'); return; }
  try { await post(`_local/vms/${vmId}/kill`, {}); toast('Its process is killed and starts again in 2 s. Text it meanwhile: nothing is lost.'); } catch (error) { toast(explain(error)); }
};
drawHeads(); if (key) enter(); else $('key').focus();
"""

PAGE = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>cockpit</title>'
        '<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns=\'http://www.w3.org/2000/svg\' viewBox=\'0 0 24 24\' fill=\'none\' stroke=\'%233b6fe0\' stroke-width=\'2.5\''
        ' stroke-linecap=\'round\'%3E%3Cpath d=\'M3 16a9 9 0 0 1 18 0M12 16l4-5\'/%3E%3C/svg%3E">'
        f"<style>{PAGE_STYLE}</style>{PAGE_BODY}<script>{PAGE_SCRIPT}</script></html>")


def csp_hash(inline: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode() + "'"


PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {csp_hash(PAGE_SCRIPT)}; style-src {csp_hash(PAGE_STYLE)}; connect-src 'self'; img-src 'self' data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-store"}


# --- Local mode ---

LOCAL_RESTART_S = 1.0
LOCAL_FOLDER = "cockpit-local-"
THIS_FILE = os.path.realpath(__file__)
PASSED_ON = ("PATH", "HOME", "LANG", "TERM", "TMPDIR")


@web.middleware
async def fence(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Keep /_local to this machine: a tunnel or a page elsewhere must not hand anybody a shell."""
    if request.path.startswith("/_local"):
        host = re.sub(r":[0-9]*$", "", request.headers.get("Host", "")).lower()
        forwarded = any(name.lower() == "forwarded" or name.lower().startswith("x-forwarded") for name in request.headers)
        if not is_loopback(host) or forwarded or not is_loopback(request.remote or ""):
            raise Refusal("forbidden", "/_local answers this machine only")
        if request.method == "POST" and not request.path.startswith("/_local/twilio/") and request.can_read_body and request.content_type != "application/json":
            raise Refusal("unsupported_media_type", "send Content-Type: application/json")
    return await handler(request)


@dataclass(slots=True, kw_only=True, eq=False)
class LocalMachine:
    """A machine of the stand-in: a child process with its own environment, folder and port."""

    id: str
    region: str
    config: Json
    folder: Path
    port: int
    state: str = "created"
    instance_id: str = ""
    events: list[Json] = field(default_factory=list)  # newest first
    created_at: str = field(default_factory=lambda: timestamp(time.time()))
    process: asyncio.subprocess.Process | None = None
    keeper: asyncio.Task[None] | None = None

    def to_json(self) -> Json:
        return {"id": self.id, "name": self.id, "state": self.state, "region": self.region, "instance_id": self.instance_id, "config": self.config,
                "created_at": self.created_at, "host_status": "ok", "checks": [], "events": self.events[:20]}


@dataclass(slots=True, kw_only=True, eq=False)
class LocalApp:
    name: str
    network: str
    secrets: dict[str, str] = field(default_factory=dict)
    version: int = 0
    ips: list[Json] = field(default_factory=list)
    volumes: list[Json] = field(default_factory=list)
    machines: dict[str, LocalMachine] = field(default_factory=dict)


def remove_left_folders() -> None:
    """Remove what the VMs of a killed gateway left on disk: its process id stands in the folder's name."""
    for folder in Path(tempfile.gettempdir()).glob(f"{LOCAL_FOLDER}*"):
        with contextlib.suppress(ValueError, PermissionError):  # not ours
            try:
                os.kill(int(folder.name.removeprefix(LOCAL_FOLDER).partition("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)


class LocalFly:
    """A stand-in for the Machines API that speaks HTTP; its machines are `python cockpit.py vm` processes."""

    def __init__(self, settings: Settings, owner: Owner) -> None:
        self._settings, self._owner = settings, owner
        self.apps: dict[str, LocalApp] = {}
        remove_left_folders()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{LOCAL_FOLDER}{os.getpid()}-"))
        self._authorization = fly_authorization(settings.fly_token)

    def routes(self) -> list[web.RouteDef]:
        root = "/_local/fly/v1"
        app, machine = root + "/apps/{app}", root + "/apps/{app}/machines/{machine}"
        table: list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = [
            ("POST", root + "/apps", self._create_app), ("GET", root + "/apps", self._list_apps), ("GET", root + "/orgs/{org}/machines", self._list_org_machines),
            ("GET", app, self._get_app), ("DELETE", app, self._delete_app), ("POST", app + "/secrets", self._set_secrets),
            ("GET", app + "/ip_assignments", self._list_addresses), ("POST", app + "/ip_assignments", self._allocate_address),
            ("GET", app + "/volumes", self._list_volumes), ("POST", app + "/volumes", self._create_volume), ("DELETE", app + "/volumes/{volume}", self._delete_volume),
            ("GET", app + "/machines", self._list_machines), ("POST", app + "/machines", self._create_machine),
            ("GET", machine, self._get_machine), ("DELETE", machine, self._delete_machine),
            ("POST", machine, self._update_machine), ("GET", machine + "/wait", self._wait), ("POST", machine + "/{verb:start|stop|restart}", self._command),
        ]
        routes = [web.route(method, path, self._authorized(handler)) for method, path, handler in table]
        return [*routes, web.route("*", "/_local/vm/{app}{path:/.*}", self._proxy), web.post("/_local/vms/{app}/kill", self._kill)]

    def _authorized(self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def check(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Authorization") != self._authorization:
                return web.json_response({"error": "unauthorized"}, status=401)
            return await handler(request)
        return check

    def _app(self, request: web.Request) -> LocalApp:
        app = self.apps.get(request.match_info["app"])
        if app is None:
            raise web.HTTPNotFound(text='{"error": "app not found"}')
        return app

    def _machine(self, request: web.Request) -> LocalMachine:
        machine = self._app(request).machines.get(request.match_info["machine"])
        if machine is None:
            raise web.HTTPNotFound(text='{"error": "machine not found"}')
        return machine

    async def _create_app(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["name"] in self.apps:
            return web.json_response({"error": "Name has already been taken", "status": "name_taken"}, status=422)
        self.apps[body["name"]] = LocalApp(name=body["name"], network=body.get("network", ""))
        return web.json_response({"id": body["name"], "created_at": int(time.time() * 1000)}, status=201)

    def _app_json(self, app: LocalApp) -> Json:
        return {"id": app.name, "name": app.name, "status": "deployed", "network": app.network, "machine_count": len(app.machines),
                "volume_count": len(app.volumes), "organization": {"slug": self._settings.fly_org}}

    async def _list_apps(self, request: web.Request) -> web.Response:
        return web.json_response({"total_apps": len(self.apps), "apps": [self._app_json(app) for app in self.apps.values()]})

    async def _list_org_machines(self, request: web.Request) -> web.Response:
        machines = [machine.to_json() | {"app_name": app.name} for app in self.apps.values() for machine in app.machines.values()]
        return web.json_response({"machines": machines, "next_cursor": "", "error_regions": []})

    async def _get_app(self, request: web.Request) -> web.Response:
        return web.json_response(self._app_json(self._app(request)))

    async def _delete_app(self, request: web.Request) -> web.Response:
        app = self._app(request)
        del self.apps[app.name]
        for machine in app.machines.values():
            await self._stop(machine, "destroyed")
            shutil.rmtree(machine.folder, ignore_errors=True)
        return web.Response(status=202)

    async def _set_secrets(self, request: web.Request) -> web.Response:
        app = self._app(request)
        for name, value in (await request.json())["values"].items():
            app.secrets.pop(name, None)
            if value is not None:
                app.secrets[name] = value
        app.version += 1
        return web.json_response({"secrets": [{"name": name} for name in app.secrets], "version": app.version})

    async def _list_addresses(self, request: web.Request) -> web.Response:
        return web.json_response({"ips": self._app(request).ips})

    async def _allocate_address(self, request: web.Request) -> web.Response:
        app, kind = self._app(request), (await request.json())["type"]
        ip = {"private_v6": "fdaa:0:1::", "shared_v4": "192.0.2.", "v6": "2001:db8::"}[kind] + str(len(app.ips) + 1)
        app.ips.append({"ip": ip, "region": "global", "shared": kind == "shared_v4"})
        return web.json_response(app.ips[-1])

    async def _list_volumes(self, request: web.Request) -> web.Response:
        return web.json_response(self._app(request).volumes)

    async def _create_volume(self, request: web.Request) -> web.Response:
        app, body = self._app(request), await request.json()
        app.volumes.append({"id": "vol_" + secrets.token_hex(8), "name": body["name"], "state": "created", "region": body.get("region", "iad"), "size_gb": body.get("size_gb", 3)})
        return web.json_response(app.volumes[-1])

    async def _delete_volume(self, request: web.Request) -> web.Response:
        app = self._app(request)
        app.volumes = [volume for volume in app.volumes if volume["id"] != request.match_info["volume"]]
        return web.json_response({})

    async def _list_machines(self, request: web.Request) -> web.Response:
        return web.json_response([machine.to_json() for machine in self._app(request).machines.values()])

    async def _create_machine(self, request: web.Request) -> web.Response:
        app, body = self._app(request), await request.json()
        machine = LocalMachine(id=secrets.token_hex(7), region=str(body.get("region") or "iad").split(",")[0], config=body["config"],
                               folder=Path(tempfile.mkdtemp(dir=self._folder)), port=free_port())
        app.machines[machine.id] = machine
        if body.get("skip_launch"):
            machine.instance_id = secrets.token_hex(13)
        else:
            await self._start(app, machine)
        return web.json_response(machine.to_json())

    async def _delete_machine(self, request: web.Request) -> web.Response:
        machine = self._machine(request)
        del self._app(request).machines[machine.id]
        await self._stop(machine, "destroyed")
        return web.json_response({"ok": True})

    async def _get_machine(self, request: web.Request) -> web.Response:
        return web.json_response(self._machine(request).to_json())

    async def _update_machine(self, request: web.Request) -> web.Response:
        app, machine, body = self._app(request), self._machine(request), await request.json()
        if body.get("current_version", machine.instance_id) != machine.instance_id:
            return web.json_response({"error": "aborted: the machine has another version"}, status=409)
        await self._stop(machine, "replacing")
        machine.config = body["config"]
        await self._start(app, machine)
        return web.json_response(machine.to_json())

    async def _wait(self, request: web.Request) -> web.Response:
        machine, wanted = self._machine(request), request.query.get("state", "started")
        deadline = time.monotonic() + float(request.query.get("timeout", "60"))
        while machine.state != wanted or (machine.events and machine.events[0]["id"] == request.query.get("from_event_id")):
            if time.monotonic() > deadline:
                return web.json_response({"error": f"deadline_exceeded: machine failed to reach desired state, {wanted}, currently {machine.state}"}, status=408)
            await asyncio.sleep(0.05)
        return web.json_response({"ok": True, "state": machine.state, "version": machine.instance_id})

    async def _command(self, request: web.Request) -> web.Response:
        app, machine, verb = self._app(request), self._machine(request), request.match_info["verb"]
        previous = machine.state
        if verb in ("stop", "restart"):
            await self._stop(machine, "stopped")
        if verb in ("start", "restart"):
            await self._start(app, machine)
        return web.json_response({"ok": True, "previous_state": previous})

    async def _start(self, app: LocalApp, machine: LocalMachine) -> None:
        if machine.keeper is None:
            machine.instance_id = secrets.token_hex(13)
            await self._spawn(app, machine)
            machine.keeper = self._owner.start(self._keep(app, machine), f"keep {machine.id}")

    async def _spawn(self, app: LocalApp, machine: LocalMachine) -> None:
        environ = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | app.secrets
        command = [sys.executable, THIS_FILE, "vm", "--host", "127.0.0.1", "--port", str(machine.port), "--until-stdin-closes"]
        if self._settings.local_agent:
            command += ["--agent", self._settings.local_agent]
        output = await asyncio.to_thread(os.open, machine.folder / "vm.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            machine.process = await asyncio.create_subprocess_exec(*command, cwd=machine.folder, env=environ, stdin=asyncio.subprocess.PIPE,
                                                                   stdout=output, stderr=output, start_new_session=True)
        finally:
            os.close(output)
        machine.state = "started"
        machine.events.insert(0, {"id": secrets.token_hex(13), "type": "start", "status": "started", "timestamp": int(time.time() * 1000)})

    async def _keep(self, app: LocalApp, machine: LocalMachine) -> None:
        """The restart policy `always`."""
        while machine.process is not None:
            code = await machine.process.wait()
            kill_group(machine.process)  # what it ran does not outlive it
            machine.process, machine.state = None, "starting"
            log_event("local_vm_exited", vm_id=app.name, exit_code=code, restarts_in_s=LOCAL_RESTART_S)
            await asyncio.sleep(LOCAL_RESTART_S)
            await self._spawn(app, machine)

    async def _stop(self, machine: LocalMachine, state: str) -> None:
        if machine.keeper is not None:
            machine.keeper.cancel()
            await asyncio.wait({machine.keeper})
            machine.keeper = None
        machine.state = state
        if machine.process is not None:
            kill_group(machine.process)
            await machine.process.wait()
            machine.process = None

    async def _kill(self, request: web.Request) -> web.Response:
        for machine in self._app(request).machines.values():
            if machine.process is not None:
                kill_group(machine.process)
        return web.Response(status=204)

    async def _proxy(self, request: web.Request) -> web.StreamResponse:
        """Like Fly's proxy: 503 while nothing listens; a connection that the VM drops is dropped here too."""
        machine = next((machine for machine in self._app(request).machines.values() if machine.process is not None), None)
        if machine is None:
            return web.Response(status=503, text="no machine is running")
        headers = {name: value for name, value in request.headers.items() if name.lower() in ("authorization", "content-type", "idempotency-key")}
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session, session.request(
                    request.method, f"http://127.0.0.1:{machine.port}{request.match_info['path']}", data=await request.read(), headers=headers) as answer:
                return web.Response(status=answer.status, body=await answer.read(), headers={"Content-Type": answer.headers.get("Content-Type", "application/octet-stream")})
        except aiohttp.ClientConnectorError:
            return web.Response(status=503, text="the machine does not listen yet")
        except aiohttp.ClientError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=502)

    async def close(self) -> None:
        """End every local VM."""
        for app in self.apps.values():
            for machine in app.machines.values():
                await self._stop(machine, "destroyed")
        shutil.rmtree(self._folder, ignore_errors=True)


def kill_group(leader: asyncio.subprocess.Process) -> None:
    """End a process and whatever it started, also when it has ended itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalTwilio:
    """A stand-in for Twilio that speaks HTTP: takes messages over REST, signs and delivers texts to /sms, keeps the threads."""

    KEPT = 10_000

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._messages: deque[Json] = deque(maxlen=self.KEPT)
        basic = base64.b64encode(f"{settings.twilio_account_sid}:{settings.twilio_auth_tokens[0]}".encode()).decode()
        self._authorization = f"Basic {basic}"

    def routes(self) -> list[web.RouteDef]:
        messages = "/_local/twilio/2010-04-01/Accounts/{account}/Messages.json"
        return [web.post(messages, self._create), web.get(messages, self._list), web.post("/_local/texts", self._text), web.get("/_local/texts", self._thread)]

    def _refuses(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") == self._authorization and request.match_info["account"] == self._settings.twilio_account_sid:
            return None
        return web.json_response({"code": 20003, "message": "Authenticate", "status": 401}, status=401)

    def _record(self, direction: str, sender: str, recipient: str, body: str, media: Sequence[str] = (), sid: str = "") -> Json:
        now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S +0000")
        message = {"sid": sid or "SM" + secrets.token_hex(16), "account_sid": self._settings.twilio_account_sid, "direction": direction, "from": sender, "to": recipient,
                   "body": body, "media": list(media), "num_media": str(len(media)), "status": "received" if direction == "inbound" else "delivered",
                   "date_created": now, "date_sent": now, "date_updated": now, "error_code": None}
        self._messages.append(message)
        return message

    async def _create(self, request: web.Request) -> web.Response:
        if refusal := self._refuses(request):
            return refusal
        form = await request.post()
        media = [str(value) for value in form.getall("MediaUrl", [])]
        recipient, body = str(form.get("To", "")), str(form.get("Body", ""))
        if not PHONE.fullmatch(recipient.removeprefix("whatsapp:")):
            return web.json_response({"code": 21211, "message": f"Invalid 'To' Phone Number: {recipient}", "status": 400}, status=400)
        if utf16_units(body) > PART_UNITS:
            return web.json_response({"code": 21617, "message": "The concatenated message body exceeds the 1600 character limit", "status": 400}, status=400)
        return web.json_response(self._record("outbound-api", str(form.get("From", "")), recipient, body, media), status=201)

    async def _list(self, request: web.Request) -> web.Response:
        if refusal := self._refuses(request):
            return refusal
        wanted = {field_name: request.query[name] for name, field_name in (("To", "to"), ("From", "from")) if name in request.query}
        found = [message for message in reversed(self._messages) if all(message[name] == value for name, value in wanted.items())]
        return web.json_response({"messages": found[:1000], "next_page_uri": None})

    async def _text(self, request: web.Request) -> web.Response:
        """Send a text as a phone would."""
        body = await read_json(request, SMS_BODY_BYTES)
        faults = Faults()
        sender, words = body.get("from"), body.get("body")
        if not isinstance(sender, str) or not PHONE.fullmatch(sender):
            faults.add("from", "must be a phone number such as +15551234567")
        if not isinstance(words, str) or len(words) > PART_UNITS:
            faults.add("body", "must be a text of at most 1600 characters")
        faults.check()
        settings = self._settings
        message = self._record("inbound", str(sender), settings.twilio_phone_number, str(words))
        form = [("ApiVersion", "2010-04-01"), ("MessageSid", message["sid"]), ("SmsMessageSid", message["sid"]), ("SmsSid", message["sid"]), ("SmsStatus", "received"),
                ("AccountSid", settings.twilio_account_sid), ("From", str(sender)), ("To", settings.twilio_phone_number), ("Body", str(words)), ("NumMedia", "0"),
                ("NumSegments", "1"), ("FromCity", ""), ("FromCountry", "US")]
        headers = {"X-Twilio-Signature": twilio_signature(settings.twilio_auth_tokens[0], settings.public_url + "/sms", form), "Content-Type": "application/x-www-form-urlencoded"}
        origin = settings.twilio_url.removesuffix("/_local/twilio")
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as session, session.post(f"{origin}/sms", data=urlencode(form).encode(), headers=headers) as answer:
            document = await answer.text()
        for reply in re.findall(r"<Message>(.*?)</Message>", document, re.DOTALL) if answer.status == 200 else ():
            self._record("outbound-reply", settings.twilio_phone_number, str(sender), html.unescape(reply))
        return json_response({"sid": message["sid"], "webhook_status": answer.status}, status=201)

    async def _thread(self, request: web.Request) -> web.Response:
        """One phone's thread, both directions, oldest first."""
        phone = request.query.get("phone", "").replace(" ", "+")
        texts = [{"sid": message["sid"], "direction": "in" if message["direction"] == "inbound" else "out", "from": message["from"], "to": message["to"],
                  "body": message["body"], "media": message["media"], "at": message["date_created"]}
                 for message in self._messages if phone in (message["from"], message["to"])]
        return json_response({"texts": texts})


class KeptAsFound:
    """Local VMs end with the gateway, so the state files are put back as they were found, also by the next start after a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = [path.with_name(path.name + suffix) for suffix in ("", ".journal", ".bak")]
        self._kept, self._unfinished = path.with_name(path.name + ".found"), path.with_name(path.name + ".found.tmp")

    def keep(self) -> None:
        """Set the files aside (blocking), or first put back what an earlier run set aside; call it with the lock held."""
        self.put_back()
        with self._told():
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished.mkdir(mode=0o700)
            for file in self._files:
                if file.exists():
                    shutil.copy2(file, self._unfinished)
            self._unfinished.rename(self._kept)

    def put_back(self) -> None:
        """Restore what was set aside and remove what grew beside it (blocking)."""
        if not self._kept.is_dir():
            return
        with self._told():
            for file in self._files:
                found = self._kept / file.name
                if found.exists():
                    write_atomically(file, [found.read_bytes()])
                    file.chmod(found.stat().st_mode & 0o777)
                else:
                    file.unlink(missing_ok=True)
            self._kept.rename(self._unfinished)  # in one step: half of it would tell less than was found
            shutil.rmtree(self._unfinished)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self._path} cannot be set aside or put back: {error.strerror}") from error


class VmServer:
    """A working server of what a VM speaks: one command at a time, answers stored so that a repeated command is not run again."""

    KEPT = 100

    def __init__(self, token: str, agent: str, folder: Path) -> None:
        self._token, self._agent, self._folder = token, agent, folder
        self._answers_file = folder / ".cockpit-vm-answers.json"
        self._running = ""
        self._answers: OrderedDict[str, Json] = OrderedDict()
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._answers.update(json.loads(self._answers_file.read_bytes()))

    def app(self) -> web.Application:
        app = web.Application(client_max_size=256 * 1024)
        app.add_routes([web.get("/health", self._health), web.post("/command", self._command), web.get("/images/{name}", self._image)])
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    def _check(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "")
        if self._token and not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {self._token}".encode()):
            raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Bearer"})

    async def _command(self, request: web.Request) -> web.Response:
        self._check(request)
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict) or not isinstance(body.get("text"), str):
            return web.json_response({"error": 'send {"text": "..."}'}, status=400)
        key = request.headers.get("Idempotency-Key", "")
        if key and key in self._answers:
            return web.json_response(self._answers[key])
        if self._running:
            return web.json_response({"error": "busy"}, status=409)
        self._running = key or "unnamed"
        # The command goes on when the caller hangs up: its answer is stored for the next time.
        return web.json_response(await asyncio.shield(asyncio.ensure_future(self._run(key, body["text"]))))

    async def _run(self, key: str, text: str) -> Json:
        began = time.monotonic()
        try:
            words, images, code = await (self._run_agent(text) if self._agent else self._answer(text))
            answer = {"text": words, "images": images, "exitCode": code, "durationMs": int((time.monotonic() - began) * 1000)}
            if key:
                self._answers[key] = answer
                while len(self._answers) > self.KEPT:
                    self._answers.popitem(last=False)
                await asyncio.to_thread(write_atomically, self._answers_file, [dump(self._answers).encode()])
            return answer
        finally:
            self._running = ""

    async def _run_agent(self, text: str) -> tuple[str, list[Json], int]:
        try:
            process = await asyncio.create_subprocess_exec(*shlex.split(self._agent), cwd=self._folder, stdin=asyncio.subprocess.PIPE,
                                                           stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        except (OSError, ValueError) as error:
            return f"LOCAL_AGENT could not be started: {error}", [], 127
        try:
            output, _ = await process.communicate(text.encode())
        finally:
            if process.returncode is None:  # this server is ending
                process.kill()
        return output.decode("utf-8", "replace"), [], process.returncode or 0

    async def _answer(self, text: str) -> tuple[str, list[Json], int]:
        """The built-in agent: echoes, draws, sleeps and crashes on request."""
        words = text.strip().lower().split()
        if words == ["crash"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if words[:1] == ["sleep"] and len(words) == 2 and words[1].replace(".", "", 1).isdecimal():
            await asyncio.sleep(min(3600.0, float(words[1])))
            return f"Slept {words[1]} s.", [], 0
        if words == ["image"]:
            name = f"{secrets.token_hex(8)}.png"
            (self._folder / "images").mkdir(exist_ok=True)
            await asyncio.to_thread((self._folder / "images" / name).write_bytes, draw_png(160, 100))
            return "Here is an image.", [{"type": "image/png", "url": f"/images/{name}"}], 0
        return text, [], 0

    async def _image(self, request: web.Request) -> web.StreamResponse:
        self._check(request)
        name = request.match_info["name"]
        file = self._folder / "images" / name
        if not IMAGE_PATH.fullmatch(f"/images/{name}") or not file.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(file)


def draw_png(width: int, height: int) -> bytes:
    """A small picture: a gradient with a horizon."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    rows = b"".join(b"\0" + b"".join(bytes((40, 60 + y, 200 - x // 2) if y < height * 0.6 else (30, 90 + x // 4, 60)) for x in range(width)) for y in range(height))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- Assembly ---


async def run_gateway(app: web.Application, settings: Settings, clock: Clock) -> AsyncIterator[None]:
    """Hold the state file for as long as the gateway runs; in local mode put it back as it was found."""
    path = Path(await asyncio.to_thread(os.path.realpath, settings.routes_file))
    lock = await asyncio.to_thread(StateLock, path)
    kept = KeptAsFound(path) if settings.fly_is_local else None
    try:
        if kept is not None:
            await asyncio.to_thread(kept.keep)
        async with run_parts(app, settings, clock, path):
            yield
    finally:
        if kept is not None:
            await asyncio.to_thread(kept.put_back)
        lock.close()


@contextlib.asynccontextmanager
async def run_parts(app: web.Application, settings: Settings, clock: Clock, path: Path) -> AsyncIterator[None]:
    """Bring the parts up in order, and down in the reverse."""
    disk, owner, metrics, burst = Owner(), Owner(), app[METRICS], Burst()
    store = await asyncio.to_thread(RouteStore, path, clock, disk)
    if store.recovered:
        log_event("routes_recovered", level=logging.WARNING, note=store.recovered)
    journal = Journal(path.with_name(path.name + ".journal"), clock, disk, metrics)
    records = await asyncio.to_thread(journal.read)
    timeouts = aiohttp.ClientTimeout(total=60)
    async with (
        # Cookies carry Fly's affinity: a fresh app is visible to whoever sends them back. `unsafe` allows bare addresses.
        aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True), timeout=timeouts) as fly_session,
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), timeout=timeouts, connector=aiohttp.TCPConnector(limit=100), request_class=PreparedRequest) as twilio_session,
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), timeout=timeouts, connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, request_class=PreparedRequest) as vm_session,
    ):
        fly, twilio, vms = FlyClient(fly_session, settings, clock, metrics), TwilioClient(twilio_session, settings, clock, metrics, owner, burst), VmClient(vm_session, settings, clock, owner, burst)

        def restart(vm_id: str) -> None:
            fleet.begin(vm_id, "restart")
        relay = Relay(settings, clock, store, journal, vms, twilio, owner, metrics, wake=fly.wake, restart=restart)

        async def vm_gone(vm_id: str, reason: str) -> None:
            await fleet.vm_gone(vm_id, reason)
        provisioner = Provisioner(settings, clock, store, fly, vms, owner, metrics, on_ready=relay.vm_ready, on_gone=vm_gone)
        fleet = Fleet(settings, clock, store, fly, vms, provisioner, relay, owner)
        journal.open()
        app[GATEWAY] = Gateway(settings=settings, clock=clock, store=store, journal=journal, fly=fly, twilio=twilio, vms=vms, relay=relay, provisioner=provisioner, fleet=fleet, owner=owner,
                               metrics=metrics, burst=burst)
        try:
            if settings.production and not (store.routes or store.undo or store.pool):
                await fleet.heal()
            await relay.resume(records)
            await provisioner.recover()
            if settings.reconcile_s:
                owner.start(fleet.run(), "reconcile")
            if settings.pool_size or store.pool:
                owner.start(Pool(settings, clock, store, fly, provisioner).run(), "pool")
            if settings.backfill_s and not settings.twilio_is_local:  # the stand-in ends with us: nothing was missed
                backfill = Backfill(settings, clock, store, twilio, relay)
                await backfill.at_start()
                owner.start(backfill.run())
            relay.start()
            yield
        finally:
            await owner.close()
            await journal.close()
            await store.close()
            await disk.close()


async def drain(gateway: Gateway) -> None:
    """Stop taking in, settle what fits in DRAIN_S, leave the rest to the journal and the next start."""
    gateway.relay.draining = gateway.provisioner.draining = True
    log_event("draining", waiting=gateway.relay.waiting(), provisioning=len(gateway.provisioner.jobs))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(gateway.settings.drain_s):
            await asyncio.gather(gateway.relay.drain(), gateway.provisioner.drain())
    await gateway.owner.close()
    gateway.relay.log_done()
    log_event("drained", waiting=gateway.relay.waiting())


async def end_local_vms(app: web.Application, fly: LocalFly) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await fly.close()


def make_app(settings: Settings, clock: Clock | None = None) -> web.Application:
    """The whole gateway as an aiohttp application; nothing starts before the application does."""
    local = settings.fly_is_local or settings.twilio_is_local
    app = web.Application(client_max_size=PROVISION_BODY_BYTES, middlewares=[answer_errors, fence] if local else [answer_errors])
    clock = clock or Clock()
    app[SETTINGS], app[METRICS] = settings, Metrics(clock)
    app.add_routes([
        web.post("/provision", post_provision), web.get("/provision", get_provisions),
        web.get("/provision/{vm_id}", get_provision), web.delete("/provision/{vm_id}", delete_provision), web.patch("/provision/{vm_id}", patch_provision),
        *(web.post(f"/provision/{{vm_id}}/{what}", functools.partial(change_vm, what=what)) for what in ("restart", "upgrade")),
        web.post("/sms", post_sms), web.post("/sms/status", post_sms_status), web.post("/messages", post_messages), web.get("/messages/{sid}", get_message),
        web.get("/media/{signed}", get_media), web.get("/health", get_health), web.get("/metrics", get_metrics), web.get("/", get_page), web.get("/events", get_events),
    ])
    if local:
        add_local_world(app, settings)
    app.cleanup_ctx.append(functools.partial(run_gateway, settings=settings, clock=clock))
    return app


def add_local_world(app: web.Application, settings: Settings) -> None:
    """The stand-ins for whichever cloud is not configured."""
    if settings.fly_is_local:
        fly = LocalFly(settings, Owner())
        app.add_routes(fly.routes())
        app.cleanup_ctx.append(functools.partial(end_local_vms, fly=fly))
    if settings.twilio_is_local:
        app.add_routes(LocalTwilio(settings).routes())


# --- Command line ---

FILES_WANTED = 20_000  # 10,000 commands at a time, and as many webhooks and sends


def set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json=settings.log_format == "json"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(leave_out_the_request)


def leave_out_the_request(record: logging.LogRecord) -> bool:
    """aiohttp logs a request it cannot parse word for word, and a key may be among its words: only what kind of error it was is told."""
    if record.exc_info and isinstance(error := record.exc_info[1], HttpProcessingError | web.RequestPayloadError):
        record.msg, record.args, record.exc_info = "request_unreadable", (), None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.fields = [{"error": type(error).__name__}]
    return True


def raise_file_limit() -> None:
    """Every command in flight holds a connection: take all the file descriptors we may have, and say when they are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if 0 <= soft < FILES_WANTED:
        log_event("few_file_descriptors", level=logging.WARNING, limit=soft, wanted=FILES_WANTED,
                  remedy="raise the limit (ulimit -n, or LimitNOFILE) for more than half as many commands at a time")


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once. Returns the exit code."""
    raise_file_limit()
    app = make_app(settings)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.3)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, settings.host, settings.port, backlog=1024).start()
    starting = asyncio.ensure_future(start())

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)  # the journal holds whatever was not finished
        stop.set()
        starting.cancel()  # a start that waits for a cloud does not hold up the end

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await starting
        # What was loaded stays: collecting garbage in 100,000 routes again and again only costs time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        greet(settings)
        await stop.wait()
        await drain(app[GATEWAY])
    except asyncio.CancelledError:
        log_event("stopped_while_starting")
    except StoreError as error:
        print(f"cockpit: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cockpit: cannot listen on {settings.host}:{settings.port}: {error.strerror}; set PORT or HOST", file=sys.stderr)
        return 1
    finally:
        await runner.cleanup()
    return 0


def greet(settings: Settings) -> None:
    log_event("serving", host=settings.host, port=settings.port, mode="production" if settings.production else "local")
    if settings.fly_is_local or settings.twilio_is_local:
        key = "local" if "local" in settings.api_keys else "the one in COCKPIT_API_KEY"
        print(f"cockpit runs at http://127.0.0.1:{settings.port}/ - the API key is: {key}", flush=True)


async def serve_vm(host: str, port: int, agent: str, *, until_stdin_closes: bool) -> int:
    """Serve what a VM speaks until a signal, or until the gateway that started it is gone."""
    server = VmServer(os.environ.get("COCKPIT_TOKEN", ""), agent, Path.cwd())
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if until_stdin_closes:
        loop.add_reader(0, lambda: None if os.read(0, 1024) else end_with_children())
    try:
        await web.TCPSite(runner, host, port).start()
        print(f"a cockpit VM listens on {host}:{port}", flush=True)
        await stop.wait()
    except OSError as error:
        print(f"cockpit vm: cannot listen on {host}:{port}: {error.strerror}; set PORT or --port", file=sys.stderr)
        return 1
    finally:
        await runner.cleanup()
    return 0


def end_with_children() -> None:
    """The gateway died: end, and take the agent along (this process leads its own group)."""
    os.killpg(0, signal.SIGKILL)


LEAST_FREE_BYTES = 100 * 1024 * 1024


class Doctor:
    """Looks at everything the gateway depends on and says of each `ok` or what to do; takes no lock and changes nothing."""

    def __init__(self, settings: Settings, session: aiohttp.ClientSession, clock: Clock, owner: Owner) -> None:
        self._settings, self._session, self.is_well = settings, session, True
        self._fly, self._twilio = FlyClient(session, settings, clock, Metrics(clock)), TwilioClient(session, settings, clock, Metrics(clock), owner, Burst())

    def _say(self, verdict: str, subject: str, words: str = "") -> None:
        self.is_well &= verdict != "wrong"
        print(f"{verdict:5} {subject}" + (f": {words}" if words else ""), flush=True)

    def _judge(self, subject: str, fault: str) -> None:
        self._say("wrong" if fault else "ok", subject, fault)

    async def examine(self) -> None:
        """Look at one thing after the other."""
        self._say("ok", "settings")
        await asyncio.to_thread(self._look_at_state)
        if self._settings.fly_is_local:
            self._say("note", "Fly", "the stand-in is used; set FLY_API_TOKEN for the real one")
        if self._settings.twilio_is_local:
            self._say("note", "Twilio", "the stand-in is used; set TWILIO_ACCOUNT_SID, TWILIO_AUTH_TOKEN and TWILIO_PHONE_NUMBER for the real one")
        fly = () if self._settings.fly_is_local else (("Fly token", self._look_at_token), ("regions", self._look_at_regions), ("image", self._look_at_image))
        twilio = () if self._settings.twilio_is_local else (("Twilio account", self._look_at_account), ("Twilio number", self._look_at_number))
        for subject, look in (*fly, *twilio):
            try:
                await look(subject)
            except UpstreamError as error:
                self._say("wrong", subject, str(error))
        await self._look_at_public_address()

    def _look_at_state(self) -> None:
        path = Path(os.path.realpath(self._settings.routes_file))
        try:
            with tempfile.TemporaryFile(dir=path.parent) as probe:
                probe.write(b"cockpit")
            free = shutil.disk_usage(path.parent).free
        except OSError as error:
            self._say("wrong", "state folder", f"{path.parent} is not writable ({error.strerror}); mount a volume there, or set ROUTES_FILE")
            return
        self._judge("state folder", f"{path.parent} has only {free // 2**20} MiB free; make room or extend the volume" if free < LEAST_FREE_BYTES else "")
        try:
            state, note = read_state(path)
            self._say("note" if note else "ok", "routes", note or f"{len(state.routes)} in {path}" + (f", {len(state.pool)} machines in the pool" if state.pool else ""))
        except StoreError as error:
            self._say("wrong", "routes", f"{error}; or rebuild them: python cockpit.py restore")

    async def _look_at_token(self, subject: str) -> None:
        remedy, org = "make one with: fly tokens create org", self._settings.fly_org
        try:
            tokens = await self._fly.read_token()
            limited = any(token.get("apps") for token in tokens)
            orgs = {str(token.get("org_slug")) for token in tokens if token.get("org_slug")}
            await self._fly.list_apps()
        except UpstreamRejected as error:
            self._say("wrong", subject, f"Fly refuses FLY_API_TOKEN for the organisation {org} ({error.status}); {remedy}")
            return
        other = bool(orgs) and org not in orgs and org != "personal"
        self._judge(subject, f"it is limited to single apps; {remedy}" if limited else f"it is for {', '.join(sorted(orgs))}; set FLY_ORG to that, or {remedy}" if other else "")

    async def _look_at_regions(self, subject: str) -> None:
        unknown = sorted(set(self._settings.vm_regions) - await self._fly.list_regions())
        self._judge(subject, f"Fly has no region {', '.join(unknown)}; mend VM_REGION, see: fly platform regions" if unknown else "")

    async def _look_at_image(self, subject: str) -> None:
        registry, _, name = self._settings.vm_image.partition("/")
        if not name or not re.search("[.:]", registry):
            self._say("note", subject, "VM_IMAGE names no registry, so it is not looked up")
            return
        name, _, digest = name.partition("@")
        name, _, tag = name.partition(":")
        scheme = "http" if is_loopback(urlsplit(f"//{registry}").hostname or "") else "https"
        headers = {"Accept": "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
                             "application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json"}
        if registry == "registry.fly.io":  # the token is Fly's and goes nowhere else
            headers["Authorization"] = "Basic " + base64.b64encode(f"x:{self._settings.fly_token}".encode()).decode()
        status = await self._status(f"{scheme}://{registry}/v2/{name}/manifests/{digest or tag or 'latest'}", headers)
        if status == 404:
            self._say("wrong", subject, f"{self._settings.vm_image} does not exist; push it, or mend VM_IMAGE")
        else:
            self._say("ok" if status == 200 else "note", subject, "" if status == 200 else f"not checked: its registry answered {status or 'nothing'}")

    async def _status(self, url: str, headers: Mapping[str, str] | None = None) -> int:
        """The status of a GET, 0 when there is no answer."""
        try:
            async with self._session.get(URL(url, encoded=True), headers=headers, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=15)) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return 0

    async def _look_at_account(self, subject: str) -> None:
        try:
            state = str((await self._twilio.read_account()).get("status"))
        except UpstreamRejected as error:
            if self._settings.twilio_api_key:  # a standard API key may not read the account itself
                self._say("note", subject, f"not checked: TWILIO_API_KEY may not read it ({error.status})")
                return
            raise
        self._judge(subject, "" if state == "active" else f"it is {state}; see Twilio's console")

    async def _look_at_number(self, subject: str) -> None:
        number, wanted = await self._twilio.find_number(self._settings.twilio_phone_number), f"{self._settings.public_url}/sms"
        if number is None:
            self._say("wrong", subject, "TWILIO_PHONE_NUMBER is not a number of this account; mend it, or buy one")
            return
        elsewhere = number.get("sms_application_sid") or number.get("sms_url") != wanted or number.get("sms_method", "POST") != "POST"
        self._judge(subject, f"its texts go elsewhere; set its messaging webhook to {wanted} with POST, and no TwiML application" if elsewhere else "")

    async def _look_at_public_address(self) -> None:
        status = await self._status(f"{self._settings.public_url}/health")
        # Only a note: it may well be looked at before the first deploy, or from where it cannot be seen.
        self._say("ok" if status in (200, 503) else "note", "public address", "" if status in (200, 503) else f"{self._settings.public_url}/health answers {status or 'nothing'} from here")


def open_clients() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True), timeout=aiohttp.ClientTimeout(total=60))


async def examine(settings: Settings) -> int:
    """The command `doctor`; returns the exit code."""
    owner = Owner()
    try:
        async with open_clients() as session:
            doctor = Doctor(settings, session, Clock(), owner)
            await doctor.examine()
    finally:
        await owner.close()
    return 0 if doctor.is_well else 1


async def restore(settings: Settings, gateway_id: str, *, force: bool) -> int:
    """The command `restore`: rebuild routes.json from Fly's own records, saying each step; returns the exit code."""
    if settings.fly_is_local:
        print("cockpit restore: the stand-in keeps no machines; set FLY_API_TOKEN", file=sys.stderr)
        return 1
    lock = None
    try:
        path = Path(os.path.realpath(settings.routes_file))  # noqa: ASYNC240 - nothing else runs here
        lock = StateLock(path)
        await restore_routes(settings, path, gateway_id, force=force)
    except (StoreError, UpstreamError) as error:
        print(f"cockpit restore: {error}", file=sys.stderr)
        return 1
    finally:
        if lock is not None:
            lock.close()
    return 0


async def restore_routes(settings: Settings, path: Path, gateway_id: str, *, force: bool) -> None:
    """Raises StoreError or UpstreamError when that cannot be done; nothing is overwritten then."""
    disk, clock = Owner(), Clock()
    try:
        store = RouteStore(path, clock, disk)
    except StoreError:
        if not force:
            raise
        for damaged in (path, path.with_name(path.name + ".bak")):
            if damaged.exists():
                os.replace(damaged, damaged.with_name(damaged.name + ".damaged"))
                print(f"set aside as {damaged.name}.damaged: {damaged}")
        store = RouteStore(path, clock, disk)
    if store.routes and not force:
        raise StoreError(f"{path} holds {len(store.routes)} routes; --force replaces them by what Fly knows")
    async with open_clients() as session:
        census = await take_census(FlyClient(session, settings, clock, Metrics(clock)), settings, clock)
    if census.unasked:
        raise StoreError(f"Fly could not ask its regions {', '.join(census.unasked)}; try again later")
    for words in census.skipped:
        print(f"skipped {words}")
    chosen = census.choose(gateway_id, "" if store.is_new else store.gateway_id)
    if not chosen:
        raise StoreError(f"Fly holds no VM of {gateway_host(settings)} whose mark verifies; check PUBLIC_URL, COCKPIT_SECRET and FLY_ORG (nothing was written)")
    routes = {phone: claim.route(settings) for phone, claim in census.claims[chosen].items()}
    store.adopt(chosen, routes)
    await store.commit()
    await store.close()
    for phone, route in sorted(routes.items(), key=lambda entry: entry[1].vm_id):
        print(f"restored {route.vm_id} of {mask_phone(phone)} in {route.region}" if phone in store.routes else f"skipped {route.vm_id}: it is being deleted")
    print(f"{len(store.routes)} routes of the gateway {chosen} are in {path}")


class UpgradeClient:
    """Moves all VMs to the present image through a running gateway's HTTP interface, a few at a time, until one fails."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str, clock: Clock) -> None:
        self._session, self._url, self._clock, self._failed = session, url, clock, 0
        self._headers = {"Authorization": f"Bearer {key}", "Prefer": "respond-async"}

    async def _ask(self, method: str, path: str) -> tuple[int, Json]:
        try:
            async with self._session.request(method, self._url + path, headers=self._headers, allow_redirects=False) as response:
                body = json.loads(await response.read())
                return response.status, body if isinstance(body, dict) else {}
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return 0, {"detail": f"{self._url} gave no answer ({type(error).__name__}); set PUBLIC_URL, or PORT, to where the gateway listens"}

    async def _vm_ids(self) -> list[str]:
        found, after = [], ""
        while True:
            status, page = await self._ask("GET", f"/provision?limit=1000&after={quote(after)}")
            if status != 200:
                raise StoreError(str(page.get("detail") or f"the gateway answered {status}"))
            found += [vm["vm_id"] for vm in page["vms"] if vm["state"] in ("ready", "away")]
            if not (after := page["next"] or ""):
                return found

    async def _upgrade(self, vm_id: str) -> str:
        """What went wrong, or nothing."""
        status, record = await self._ask("POST", f"/provision/{vm_id}/upgrade")
        if status == HTTPStatus.NOT_FOUND:  # torn down meanwhile
            return ""
        while status in (200, 202) and record.get("step"):
            await self._clock.sleep(0.5)
            status, record = await self._ask("GET", f"/provision/{vm_id}")
        if status not in (200, 202):
            return str(record.get("detail") or status)
        error = str(record.get("last_error") or "")
        return error if error.startswith("upgrade: ") else ""  # the relay tells its errors there too

    async def run(self, at_once: int) -> int:
        """Returns the exit code; says each VM's outcome as a line."""
        waiting = await self._vm_ids()
        total, done = len(waiting), 0

        async def work() -> None:
            nonlocal done
            while waiting and not self._failed:
                vm_id = waiting.pop(0)
                if trouble := await self._upgrade(vm_id):
                    self._failed += 1
                    print(f"{vm_id}: FAILED: {trouble}", flush=True)
                else:
                    done += 1
                    print(f"{vm_id}: upgraded ({done} of {total})", flush=True)
        await asyncio.gather(*(work() for _ in range(at_once)))
        print(f"{done} upgraded, {self._failed} failed, {len(waiting)} not tried", flush=True)
        return 1 if self._failed else 0


async def upgrade(at_once: int) -> int:
    """Needs only what it takes to reach the gateway, so that it also runs elsewhere."""
    reader = SettingsReader(os.environ)
    gateway = read_gateway_settings(reader)
    if problems := [problem for problem in reader.problems if problem.startswith(("PUBLIC_URL", "COCKPIT_API_KEY", "PORT"))]:
        raise SettingsError(problems)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            return await UpgradeClient(session, gateway["public_url"], gateway["api_keys"][0], Clock()).run(at_once)
    except StoreError as error:
        print(f"cockpit upgrade: {error}", file=sys.stderr)
        return 1


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cockpit.py", description="One text message to one engineer's own VM. Settings come from the environment; see README.md.")
    commands = parser.add_subparsers(dest="command")
    vm = commands.add_parser("vm", help="serve what a VM speaks, with a built-in agent or the one given")
    vm.add_argument("--host", default=os.environ.get("HOST") or "0.0.0.0")
    vm.add_argument("--port", type=int, default=os.environ.get("PORT") or "3000")
    vm.add_argument("--agent", default=os.environ.get("LOCAL_AGENT", ""), help="a command: the text on its standard input, the answer on its standard output")
    vm.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    commands.add_parser("doctor", help="check settings, state folder, Fly and Twilio; each line says ok or what to do")
    rebuild = commands.add_parser("restore", help="rebuild routes.json from Fly's own records")
    rebuild.add_argument("--gateway", default="", metavar="ID", help="which gateway_id, when Fly knows several of this host")
    rebuild.add_argument("--force", action="store_true", help="replace the routes that the file holds, or a file that cannot be read")
    move = commands.add_parser("upgrade", help="move all VMs to the present VM_IMAGE through the running gateway; stops at the first failure")
    move.add_argument("--at-once", type=int, default=3, choices=range(1, 51), metavar="N", help="so many at a time (1 to 50; default 3)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run a command; exit code 2 for settings that are missing or wrong."""
    arguments = parse_arguments(argv)
    if arguments.command == "vm":
        return asyncio.run(serve_vm(arguments.host, arguments.port, arguments.agent, until_stdin_closes=arguments.until_stdin_closes))
    try:
        if arguments.command == "upgrade":
            return asyncio.run(upgrade(arguments.at_once))
        settings = Settings.from_env(os.environ)
    except SettingsError as error:
        if arguments.command == "doctor":
            print(*(f"wrong {problem}" for problem in error.problems), sep="\n")
            return 1
        print("cockpit cannot start; mend these settings:", *(f"  {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 2
    set_up_logging(settings)
    if arguments.command == "doctor":
        return asyncio.run(examine(settings))
    return asyncio.run(restore(settings, arguments.gateway, force=arguments.force) if arguments.command == "restore" else serve(settings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
