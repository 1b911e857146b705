"""The agent as a process: what it takes, what it says, and that it ends when told to."""

from __future__ import annotations

from tests.support.agents import Agent
from tests.support.domains import DomainFactory, wait_until
from tests.support.stopwatch import Stopwatch

RSS_MB = 90


def test_an_idle_agent_takes_less_than_90_mb(own_agent: Agent, domain: DomainFactory) -> None:
    own_agent.environment = {"COVERAGE_PROCESS_CONFIG": "", "COVERAGE_PROCESS_START": ""}  # it takes memory too
    own_agent.start(relist_interval="1")
    for _ in range(3):
        own_agent.apply(domain(size="8M").name).wait()
    wait_until(lambda: own_agent.rss_mb() < RSS_MB, f"below {RSS_MB} MB")
    print(f"an idle agent takes {own_agent.rss_mb():.0f} MB")


def test_an_idle_agent_ends_at_once_when_told_to_and_says_what_it_did(own_agent: Agent) -> None:
    own_agent.start()
    own_agent.apply("nobody").wait("False")
    assert own_agent.healthz() == (200, "ok\n")
    watch = Stopwatch()
    own_agent.stop()
    assert watch.within(5), watch
    assert f"runs the VMBackups with spec.nodeName {own_agent.node}" in own_agent.log
    assert not {"ERROR", "Traceback"} & set(own_agent.log.split())


def test_told_to_end_while_it_starts_it_ends_too(own_agent: Agent) -> None:
    own_agent.start()
    watch = Stopwatch()
    own_agent.stop()
    assert watch.within(10), watch  # kopf gives its own start-up 5 s


def test_it_warns_where_libvirts_configuration_is_not_there(own_agent: Agent) -> None:
    own_agent.start(libvirt_config_dir="/nowhere")
    assert "/nowhere does not exist" in own_agent.log
    assert "--libvirt-config-dir" in own_agent.log


def test_without_libvirtd_it_runs_and_a_backup_says_what_it_waits_for(own_agent: Agent) -> None:
    own_agent.start(libvirt_uri="qemu+unix:///session?socket=/nowhere")
    made = own_agent.apply("web-01")
    wait_until(lambda: "libvirtd" in made.status["message"], "a message", 30)
    assert made.condition("Ready")[0] == "Unknown"
    made.delete()
    assert not own_agent.records()
