"""fencing.toml: what it may say, and the sentence for what it may not."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from fencing.settings import decode_fencing, decode_secrets

GOOD = """
levels = [["servers"], ["lun", "pdu"], ["manual"]]
rounds = 2
[methods.pdu]
kind = "agent"
agent = "fence_apc"
parameters = { ip = "10.0.0.9", ssh = true }
secrets = "/etc/cfs/pdu"
ports = { n1 = "1" }
timeout_ms = 5000
delay_ms = 10
[methods.lun]
kind = "reservation"
devices = ["/dev/sdb"]
[methods.servers]
kind = "servers"
retries = 3
"""


def test_levels_become_a_plan():
    plan = decode_fencing(GOOD, "f").plan()
    assert [[m.name for m in level] for level in plan] == [["servers"], ["lun", "pdu"], ["manual"]]
    assert (plan[0][0].retries, plan[0][0].timeout_ms) == (3, 30_000)
    assert (plan[1][1].timeout_ms, plan[1][1].delay_ms) == (5000, 10)


def test_without_a_file_the_servers_are_all():
    (((only,),)) = decode_fencing("", "f").plan()
    assert only.name == "servers"


AGENT = '[methods.a]\nkind = "agent"\nagent = "fence_x"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("levels = [", "fencing.toml: Invalid"),
        ("levels = []", "length >= 1"),
        ("levels = [[]]", "length >= 1"),
        ('levels = [["pdu"]]', "names the method pdu, which has no table"),
        ('levels = [["servers", "servers"]]', "twice"),
        ("level = 1", "unknown field `level`"),
        ("rounds = 0", ">= 1"),
        ('[methods.a]\nkind = "bomb"', "methods"),
        ('[methods.a]\nkind = "agent"', "is not the name of a fence agent"),
        ('[methods.a]\nkind = "agent"\nagent = "/bin/sh"', "is not the name of a fence agent"),
        ('[methods.a]\nkind = "agent"\nagent = "fence_../x"', "is not the name of a fence agent"),
        (AGENT + 'parameters = { password = "x" }', "looks like a secret"),
        (AGENT + 'parameters = { passwd = "x" }', "looks like a secret"),
        (AGENT + 'parameters = { snmp_priv_passwd = "x" }', "looks like a secret"),
        (AGENT + 'parameters = { password_script = "x" }', "into the file of `secrets`"),
        (AGENT + 'parameters = { action = "on" }', "set by fencing itself"),
        (AGENT + 'parameters = { ip = "a\\nb=c" }', "more than one line"),
        (AGENT + 'devices = ["/dev/sda"]', "belong to kind reservation"),
        ('[methods.a]\nkind = "reservation"', "devices are missing"),
        ('[methods.a]\nkind = "manual"\nports = { n1 = "1" }', "belongs to kind agent"),
        ('[methods.servers]\nkind = "manual"', "belongs to kind servers"),
        ("[methods.servers]\nkind = 'servers'\nretries = -1", ">= 0"),
    ],
)
def test_bad_settings(text, says):
    """One sentence, with the file and the place, exit code 2."""
    with pytest.raises(ConfigError) as caught:
        decode_fencing(text, "fencing.toml")
    assert caught.value.message.startswith("fencing.toml: ")
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


def test_secrets():
    assert decode_secrets("# pdu\n\npassword=a=b \nlogin=x\n", "s") == {
        "password": "a=b ",
        "login": "x",
    }
    for bad in ("password", "=x", "action=on"):
        with pytest.raises(ConfigError, match="line 1"):
            decode_secrets(bad, "s")
