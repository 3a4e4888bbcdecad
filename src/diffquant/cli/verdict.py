"""Rendering of a verification: used by `verify`, and by `quantize --verify image`."""

from __future__ import annotations

from typing import Any

from diffquant.cli.ask_gates import render_gates
from diffquant.cli.frame import echo, table

__all__ = ["decibel", "render_pictures", "render_verify", "strip_pictures"]


def strip_pictures(report: Any) -> dict[str, Any]:  # noqa: ANN401 - runtime.verify.VerifyReport
    """Turn a VerifyReport into the JSON that others rely on; pictures stay out of it."""
    from diffquant.core.report import to_json

    image = to_json(report.image) if report.image is not None else None
    return {
        "level": report.level,
        "verdict": report.verdict,
        "load": to_json(report.load),
        "tensors": to_json(report.tensors),
        "image": image,
        "gates": to_json(report.gates),
    }


def decibel(value: float | None, *, identical: bool = False) -> str:
    """A PSNR as people read it."""
    if identical:
        return "identical"
    return "-" if value is None else f"{value:.1f} dB"


def render_verify(result: dict[str, Any]) -> None:
    """Print levels, worst weights, pictures, and the verdict last."""
    load = result["load"]
    echo(f"load     {load['verdict']}: {load['architecture']}, {load['weights']} weights")
    for text in load["problems"][:5]:
        echo(f"         {text}")
    tensors = result["tensors"]
    if tensors:
        error = tensors["error"]
        detail = "" if error is None else f", relative error {error:.4f}"
        echo(f"tensors  {tensors['verdict']}: {tensors['compared']} compared{detail}")
        if tensors["corrected"]:
            echo(f"         {tensors['corrected']} biases were corrected, and are not judged")
        for row in [row for row in tensors["worst"] if row["verdict"] != "pass"][:5]:
            echo(
                f"         {row['verdict']}: {row['key']} {row['stored']} error {row['error']:.4f}"
            )
    render_gates(result["gates"], "         ")
    for gate in result["gates"]:
        if gate["why"]:
            echo(f"         {gate['why']}")
    image = result["image"]
    if image:
        render_pictures({**image, "device": result["device"], "device_why": result["device_why"]})
    echo(f"verdict  {result['verdict']}")


def render_pictures(image: dict[str, Any]) -> None:
    """Print pictures and what drew them."""
    render_image(image)
    echo(f"         drawn on {image['device']} ({image['device_why']})")


def render_image(image: dict[str, Any]) -> None:
    """Print pictures: the pooled number, its interval, floor and control, then every pair."""
    interval = image["interval_db"]
    between = f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
    value = decibel(image["psnr_db"], identical=image["identical"])
    echo(f"image    {image['verdict']}: PSNR {value}{between}, SSIM {image['ssim']:.4f}")
    if image["engine"]:
        echo(f"         {image['engine']}: {image['how']}")
    echo(
        f"         noise floor {decibel(image['noise_floor_psnr_db'])}, control "
        f"{decibel(image['control_psnr_db'])} ({image['control_block']}), gate "
        f"{image['min_psnr_db']:g} dB"
    )
    table(
        ("         prompt", "seed", "PSNR", "SSIM", ""),
        [
            (
                f"         {pair['prompt'][:48]}",
                str(pair["seed"]),
                decibel(pair["psnr_db"], identical=pair["psnr_db"] is None),
                f"{pair['ssim']:.4f}",
                ", ".join(pair["defects"]),
            )
            for pair in image["pairs"]
        ],
        right=(1, 2, 3),
    )
    render_gates(image["gates"], "         ")
    for text in image["problems"]:
        echo(f"         {text}")
