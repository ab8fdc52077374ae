"""`tunesmith check --gpu-memory`: a plan for a card that is not there."""

from __future__ import annotations

from click.testing import CliRunner

from tunesmith.cli.main import cli


def test_a_card_that_is_not_there() -> None:
    done = CliRunner().invoke(cli, ["check", "quickstart", "--gpu-memory", "16GB", "--no-bf16"])
    assert done.exit_code == 0, done.output
    assert "fits in 14.90 GiB" in done.output  # 16e9 / 2^30
    assert "planned for another device" in done.output


def test_a_size_that_is_none() -> None:
    done = CliRunner().invoke(cli, ["check", "quickstart", "--gpu-memory", "16"])
    assert done.exit_code == 2 and "16GB" in done.output


def test_a_card_that_is_too_small_fails_the_check_and_says_what_is_missing() -> None:
    done = CliRunner().invoke(cli, ["check", "quickstart", "--gpu-memory", "0.5GB"])
    assert done.exit_code == 2, done.output
    assert "DOES NOT FIT in 0.47 GiB" in done.output
