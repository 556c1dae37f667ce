"""`cvmctl` against a manager over in-memory disks, through the same JSON as the control socket."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest
import trio
from click.testing import CliRunner

import cvm.cli
from cluster.control import Call, Reply, decode_line_untrusted, encode_line
from cluster.errors import StackError, UnreachableError
from cluster.errors_wire import failure_of, raise_failure
from tests.cvm.fakes import Cluster, open_on


class FakeDaemon:
    """Answers `cvm.<verb>` as clusterd does: one line of JSON in, one out."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.manager = self.cluster.manager()

    def call(self, method: str, params: dict) -> object:
        request = decode_line_untrusted(encode_line(Call(1, method, params)))
        assert isinstance(request, Call)
        try:
            verb = request.method.removeprefix("cvm.")
            reply = Reply(1, trio.run(self.manager.call, verb, request.params))
        except StackError as error:
            reply = Reply(1, error=failure_of(error))
        answer = decode_line_untrusted(encode_line(reply))
        assert isinstance(answer, Reply)
        if answer.error is not None:
            raise_failure(answer.error)
        return answer.result


class Shell:
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    def __call__(self, line: str, code: int = 0) -> str:
        result = CliRunner().invoke(cvm.cli.main, line.split(), prog_name="cvmctl")
        assert result.exit_code == code, (line, result.exit_code, result.output, result.exception)
        return result.output


@pytest.fixture
def shell(monkeypatch) -> Shell:
    daemon = FakeDaemon()
    monkeypatch.setattr(cvm.cli, "call", daemon.call)
    return Shell(daemon)


@pytest.fixture
def volume(shell) -> Shell:
    shell("pvcreate s1/disk0 s2/disk0")
    shell("vgcreate vg0 s1/disk0 s2/disk0")
    shell("lvcreate -n vol0 -i 2 -I 64k -L 64m vg0")
    return shell


def test_the_documented_flow(shell) -> None:
    assert shell("pvcreate s1/disk0") == '  Physical volume "s1/disk0" successfully created.\n'
    shell("pvcreate s2/disk0")
    assert shell("vgcreate vg0 s1/disk0 s2/disk0") == (
        '  Volume group "vg0" successfully created\n'
    )
    assert shell("lvcreate -n vol0 -i 2 -I 64k -L 64m vg0") == (
        '  Logical volume "vol0" created.\n'
    )
    assert shell("lvextend -L +8m vg0/vol0") == (
        "  Size of logical volume vg0/vol0 changed from 64.00 MiB (16 extents) "
        "to 72.00 MiB (18 extents).\n"
        "  Logical volume vg0/vol0 successfully resized.\n"
    )
    assert "vol1" in shell("lvcreate -n vg0/vol1 -l 100%FREE vg0")
    assert shell("vgs --noheadings -o vg_free").strip() == "0"
    shell("lvremove -y vg0")
    shell("vgremove vg0")
    shell("pvremove s1/disk0 s2/disk0")
    assert shell("pvs") == ""


def test_listings_look_like_lvm(volume) -> None:
    assert volume("pvs").splitlines() == [
        "  PV       VG  Fmt Attr   PSize  PFree",
        "  s1/disk0 vg0 cvm a--  124.00m 92.00m",
        "  s2/disk0 vg0 cvm a--  124.00m 92.00m",
    ]
    assert volume("vgs").splitlines() == [
        "  VG  #PV #LV #SN Attr     VSize   VFree",
        "  vg0   2   1   0 wz--ns 248.00m 184.00m",
    ]
    lines = volume("lvs -o +devices,stripes").splitlines()
    assert lines[0].split()[:4] == ["LV", "VG", "Attr", "LSize"]
    assert lines[1].split() == [
        "vol0", "vg0", "-wi-------", "64.00m", "s1/disk0(0),s2/disk0(0)", "2",
    ]  # fmt: skip
    assert volume("lvs --noheadings --nosuffix --units b -o lv_size vg0/vol0") == "  67108864\n"
    assert volume("lvs --noheadings --separator , -o name,vg_name") == "  vol0,vg0\n"
    assert "lv_name" in volume("lvs -o help")
    assert volume("pvs --noheadings -o pv_name -O -pv_name").split() == ["s2/disk0", "s1/disk0"]


def test_json_is_lvms(volume) -> None:
    report = json.loads(volume("lvs --json -o lv_name,lv_size --units m"))
    assert report == {"report": [{"lv": [{"lv_name": "vol0", "lv_size": "64.00m"}]}]}
    groups = json.loads(volume("status --json"))["groups"]
    assert groups[0]["lvs"][0]["lv_size"] == 64 << 20


def test_exit_codes_are_lvms(volume, monkeypatch) -> None:
    volume("lvs vg0/none", 5)
    volume("vgcreate vg0 s1/disk0", 5)
    volume("lvcreate -n big -L 1t vg0", 5)
    volume("lvcreate -n bad -L 1x vg0", 3)
    volume("lvcreate --nonsense vg0", 3)
    volume("lvcreate vg0", 3)
    volume("lvs -o nonsense", 3)
    volume("lvs --units q", 3)
    volume("nonsense", 3)
    volume("lvremove vg0/vol0", 5)
    assert "vol0" in volume("lvs")
    volume("--help")

    def away(*_args: object) -> None:
        raise UnreachableError("cannot reach clusterd")

    monkeypatch.setattr(cvm.cli, "call", away)
    assert "is clusterd running?" in volume("pvs", 6)


def test_dry_run_says_so_and_does_nothing(volume) -> None:
    before = volume("status")
    output = volume("lvextend --dry-run -l +100%FREE vg0/vol0")
    assert output.startswith("  TEST MODE: ")
    assert "to 248.00 MiB" in output
    volume("lvremove -t vg0/vol0")
    volume("vgremove --test vg0")
    assert volume("status") == before


def test_status_draws_the_tree(volume) -> None:
    trio.run(open_on, volume.daemon.cluster, "vg0/vol0", 1)
    volume("activate vg0/vol0")
    lines = volume("status").splitlines()
    assert "  group: vg0" in lines
    assert "  state: ONLINE" in lines
    tree = "\n".join(" ".join(line.split()) for line in lines)
    assert "vol0 ONLINE 64.00m striped x2, 64.00k" in tree
    assert "s1/disk0 ONLINE 32.00m" in tree
    assert "@n1 open mount n1.1.1 sharedwrite" in tree
    assert "@n1 open activation n1.1.0 sharedwrite" in tree
    volume.daemon.cluster.away.add("s2/disk0")
    text = volume("status")
    assert "state: DEGRADED" in text
    assert "server does not answer" in text
    volume("deactivate vg0/vol0", 5)


def test_busy_names_the_holder(volume) -> None:
    trio.run(open_on, volume.daemon.cluster, "vg0/vol0", 2)
    output = volume("lvremove -y vg0/vol0", 5)
    assert "in use" in output
    assert "mount n2.1.1 on n2" in output


def test_history_lists_changes(volume) -> None:
    lines = volume("history vg0").splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert "lvcreate vg0/vol0" in lines[1]


def test_machine_readable_answers(volume) -> None:
    answer = msgspec.json.decode(volume("lvcreate --json -n x -L 4m vg0"))
    assert answer == {"messages": ['Logical volume "x" created.']}
    assert volume("lvremove -q -y vg0/x") == ""


def test_the_cli_does_not_need_trio() -> None:
    """Start-up of the tool stays cheap: no event loop, no cores."""
    code = "import sys, cvm.cli; print('trio' in sys.modules, 'cvm.manager' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == ["False", "False"]
