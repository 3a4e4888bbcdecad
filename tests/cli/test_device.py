"""--device: what `auto` means to `verify`, `compare` and `calibrate`, and what is said of it."""

from dataclasses import dataclass

import pytest

from diffquant.quant.cards import NO_CARDS
from diffquant.runtime import devices
from diffquant.runtime.devices import Device

BROKEN = Device("cpu", "the CUDA card does not compute: no kernel image", failed=True)
CARD = Device("cuda", "a card")


@dataclass
class Drawn:
    """A report of pictures."""

    verdict: str


FEW = ("--seeds", 0, "--steps", 1, "--size", "64")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle on a blue background\n")
    return path


@pytest.fixture
def auto(monkeypatch):
    """Let `auto` find a device; how often it was asked is counted."""

    def finds(found):
        asked = []
        monkeypatch.setattr(devices, "auto_device", lambda: (asked.append(found), found)[1])
        return asked

    return finds


@pytest.fixture
def calls(gguf_file, examples, prompts, tmp_path):
    """Command -> its arguments, `auto` by default or by name."""
    flux = examples / "flux1-shapes"
    return {
        "verify": (gguf_file, "--against", flux, "--prompts", prompts, *FEW),
        "compare": (flux, gguf_file, "--metrics", "psnr", "--prompts", prompts, *FEW),
        "calibrate": (
            flux, "--prompts", prompts, "-o", tmp_path / "i.gguf", *FEW[2:], "--device", "auto",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["verify", "compare", "calibrate"])
def test_a_card_that_does_not_compute_is_told_and_the_cpu_taken(name, command, calls, auto):
    asked = auto(BROKEN)
    ran = command(name, *calls[name], "--json")
    assert ran.code in (0, 3), ran.err
    assert len(asked) == 1
    assert f"computed on the CPU: {BROKEN.why}" in ran.err
    found = ran.json["result"]  # one step is few for a verdict
    assert found["device"] == "cpu"
    assert name == "compare" or found["device_why"] == BROKEN.why


@pytest.mark.parametrize("name", ["verify", "compare", "calibrate"])
def test_the_cpu_that_is_asked_for_is_taken_without_a_word(name, command, calls, auto):
    asked = auto(BROKEN)
    ran = command(name, *calls[name], "--device", "cpu", "--json")
    assert not asked
    assert "computed on the CPU" not in ran.err
    found = ran.json["result"]  # one step is few for a verdict
    assert found["device"] == "cpu"
    assert name == "compare" or found["device_why"] == "asked for"


def test_people_are_told_what_drew(command, calls, auto):
    auto(Device("cpu", "torch reaches no CUDA card"))
    assert "drawn on cpu (torch reaches no CUDA card)" in command("verify", *calls["verify"]).out
    assert " s on cpu\n" in command("calibrate", *calls["calibrate"]).out


def test_weights_alone_ask_for_no_device(command, calls, auto):
    asked = auto(BROKEN)
    ran = command("verify", *calls["verify"][:3], "--level", "tensors", "--json")
    assert (ran.code, ran.result["device"], ran.result["device_why"]) == (0, "", "")
    assert not asked


def test_a_matrix_is_measured_on_the_cpu_unless_a_card_is_asked_for(command, calls, auto):
    """It goes into files: their bytes shall not depend on the machine."""
    asked = auto(BROKEN)
    ran = command("calibrate", *calls["calibrate"][:-2], "--json")
    assert (ran.code, ran.result["device"], ran.result["device_why"]) == (0, "cpu", "asked for")
    assert not asked


@pytest.mark.parametrize(
    ("engine", "device"), [("bundled", "cuda"), ("diffusers", "cuda"), ("sdcpp", "cpu")]
)
def test_a_card_draws_where_the_engine_can(engine, device, command, calls, auto, monkeypatch):
    auto(CARD)
    seen = []

    def stop(*_paths, **options):
        seen.append(options["settings"])
        raise KeyboardInterrupt

    monkeypatch.setattr("diffquant.runtime.verify.verify", stop)
    assert command("verify", *calls["verify"], "--engine", engine).code == 130
    monkeypatch.setattr(
        "diffquant.runtime.compare_files.compare_files",
        lambda *given, **options: stop(settings=given[2]),
    )
    assert command("compare", *calls["compare"], "--engine", engine).code == 130
    assert [one.device for one in seen] == [device, device]


@pytest.mark.parametrize("name", ["verify", "compare", "calibrate"])
def test_unknown_devices_are_refused(name, command, calls):
    ran = command(name, *calls[name], "--device", "tpu")
    assert ran.code == 2
    assert "expected auto, cpu, cuda or mps" in ran.err


def test_quantize_draws_where_it_is_told_to_encode(command, examples, tmp_path, auto, monkeypatch):
    flux, pictures = examples / "flux1-shapes", ("--verify", "image", "--json", "--force")
    given = ("quantize", flux, "-o", tmp_path / "a.gguf", "-t", "q8_0", *pictures)
    drawn = []

    def draw(_out, _source, settings, **_options):
        drawn.append(settings.device)
        return Drawn("pass"), None, ["a note"]

    monkeypatch.setattr("diffquant.runtime.compare.compare_pictures", draw)
    asked = auto(BROKEN)
    ran = command(*given)
    assert (ran.code, len(asked)) == (0, 1)
    assert f"computed on the CPU: {BROKEN.why}" in ran.err
    wanted = {"verdict": "pass", "device": "cpu", "device_why": BROKEN.why}
    assert ran.result["image"] == wanted
    assert command(*given, "--device", "cpu").result["image"]["device_why"] == "asked for"
    monkeypatch.setattr("diffquant.convert.jobs.cards_for", lambda _asked: NO_CARDS)
    assert command(*given, "--device", "cuda:1").result["image"]["device"] == "cuda:1"
    assert (drawn, len(asked)) == (["cpu", "cpu", "cuda:1"], 1)
    several = ("-t", "q4_0", "-o", f"{tmp_path}/several/", "--device", "auto")
    ran = command(*given[:2], *given[4:], *several)
    assert len(ran.result["outputs"]) == 2
    assert len(asked) == 2  # once more, for both
    assert ran.err.count(BROKEN.why) == 1
