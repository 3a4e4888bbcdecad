"""Train an autoencoder, then fold its measured latent statistics into its own weights.

The real models fix their latent scale in constants (0.18215, 0.13025, 0.3611 and 0.1159, or one
mean and deviation per channel). Instead of writing other constants into the demo models, the
trained latents are moved to where the real constants expect them: an affine map per channel,
absorbed by the last encoder layer and the first decoder layer. A demo model then also works in
programs that carry the constants in their code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bank import Bank
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen_vae
from loop import Stage, autocast, device_name, fit, say
from torch.nn import functional

__all__ = ["VaeReport", "encode_all", "latent_affine", "refine_decoder", "train_vae"]

KL_WEIGHT = 2e-4
BATCH = 64


@dataclass(frozen=True)
class VaeReport:
    """What the autoencoder's training reached."""

    steps: int
    seconds: float
    psnr_db: float


def train_vae(
    vae: Any, pictures: torch.Tensor, *, seconds: float, max_steps: int | None, batch: int = BATCH
) -> tuple[Bank, VaeReport]:
    """Train on (N, 3, 128, 128) uint8 pictures; return every picture's posterior as well.

    With no seconds the weights stay as they are, but for the latent scale.
    """
    exact = _edge_layers(vae)[2]
    # Without 1 x 1 layers the affine map is inexact at the border (padding is zero before and
    # after it), so it is applied half way and the decoder learns the difference.
    stages = (1.0,) if exact else (0.5, 0.5)
    steps, spent = 0, 0.0
    if seconds == 0:
        _move_latents(vae, encode_all(vae, pictures))
        stages = ()
    for number, share in enumerate(stages):
        done = fit(
            "vae",
            vae.parameters(),
            lambda: _loss(vae, pictures, batch),
            seconds=seconds * share,
            lr=1e-3 if number == 0 else 5e-4,
            max_steps=None if max_steps is None else max(1, int(max_steps * share)),
            weight_decay=0.0,
            ema_decay=0.995,
        )
        steps, spent = steps + done.steps, spent + done.seconds
        if number == 0:
            _move_latents(vae, encode_all(vae, pictures))
    posterior = encode_all(vae, pictures)
    quality = _psnr(vae, pictures[:512], posterior)
    shift, scale = latent_affine(vae)
    unit = (posterior.mean - shift.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    say(f"vae: {quality:.1f} dB, scaled latents mean {unit.mean():.3f} std {unit.std():.3f}")
    return posterior, VaeReport(steps, spent, quality)


def latent_affine(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and scale per channel: the denoiser sees (latent - shift) * scale."""
    device = next(vae.parameters()).device
    if isinstance(vae, qwen_vae.AutoencoderKLQwenImage):
        mean, std = (
            torch.tensor(vae.config[f"latents_{x}"], device=device) for x in ("mean", "std")
        )
        return mean, 1 / std
    ones = torch.ones(vae.config.latent_channels, device=device)
    return ones * (vae.config.shift_factor or 0.0), ones * vae.config.scaling_factor


def _loss(vae: Any, pictures: torch.Tensor, batch: int) -> torch.Tensor:
    index = torch.randint(len(pictures), (batch,), device=pictures.device)
    x = pictures[index].float() / 127.5 - 1
    if torch.rand(()) < 0.5:  # mirrored and recoloured pictures: more than the grammar's own
        x = x.flip(-1)[:, torch.randperm(3, device=x.device)]
    mean, logvar = _moments(vae, x)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    error = _decode(vae, z).float() - x
    # The prior has the scale that the finished latents are to have, before they are moved too:
    # the map in _move_latents then stays near the identity.
    shift, scale = (x.view(-1, 1, 1) for x in latent_affine(vae))
    mean, logvar = (mean - shift) * scale, logvar + 2 * scale.log()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return 0.5 * error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl


def _moments(vae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and log variance, (B, C, 16, 16) float32, through trainable paths only."""
    if isinstance(vae, qwen_vae.AutoencoderKLQwenImage):
        with _one_frame():
            h = vae.quant_conv(vae.encoder(x[:, :, None]))[:, :, 0]
    else:
        h = vae.encoder(x)
        h = vae.quant_conv(h) if vae.quant_conv is not None else h
    mean, logvar = h.float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def _decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Decode without the final clamp, which would stop gradients."""
    if isinstance(vae, qwen_vae.AutoencoderKLQwenImage):
        with _one_frame():
            return vae.decoder(vae.post_quant_conv(z[:, :, None]))[:, :, 0]
    return vae.decoder(vae.post_quant_conv(z) if vae.post_quant_conv is not None else z)


@contextmanager
def _one_frame() -> Iterator[None]:
    """Run the video autoencoder's causal 3-D convolutions as 2-D ones, for one frame only.

    The frames before the first are zeros, so only a kernel's last time slice counts: the same
    numbers, without the slow 3-D kernels.
    """

    def forward(self: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        del cache_x
        width, height = self._padding[0], self._padding[2]
        weight = self.weight[:, :, -1]
        y = functional.conv2d(x[:, :, 0], weight, self.bias, self.stride[1:], (height, width))
        return y[:, :, None]

    original: Callable[..., torch.Tensor] = qwen_vae.QwenImageCausalConv3d.forward
    qwen_vae.QwenImageCausalConv3d.forward = forward
    try:
        yield
    finally:
        qwen_vae.QwenImageCausalConv3d.forward = original


def refine_decoder(
    vae: Any, pictures: torch.Tensor, *, seconds: float, max_steps: int | None
) -> Stage:
    """Train the decoder alone: latents, and so every denoiser trained on them, stay valid."""
    frozen = [vae.encoder, *([vae.quant_conv] if getattr(vae, "quant_conv", None) else [])]
    for module in frozen:
        module.requires_grad_(False)
    bank = encode_all(vae, pictures)
    say(f"vae: {_psnr(vae, pictures[:512], bank):.1f} dB before")

    def loss() -> torch.Tensor:
        index = torch.randint(len(pictures), (BATCH,), device=pictures.device)
        x = pictures[index].float() / 127.5 - 1
        error = _decode(vae, bank.draw(index)).float() - x
        return 0.5 * error.abs().mean() + 2 * error.square().mean()

    done = fit(
        "decoder",
        vae.parameters(),
        loss,
        seconds=seconds,
        lr=1e-3,
        max_steps=max_steps,
        weight_decay=0.0,
        ema_decay=0.995,
    )
    say(f"vae: {_psnr(vae, pictures[:512], bank):.1f} dB after")
    return Stage("autoencoder's decoder", done.steps, done.seconds, BATCH, device_name())


@torch.no_grad()
def encode_all(vae: Any, pictures: torch.Tensor) -> Bank:
    """Posterior of every picture."""
    means, stds = [], []
    for chunk in pictures.split(256):
        with autocast(pictures.device):
            mean, logvar = _moments(vae, chunk.float() / 127.5 - 1)
        means.append(mean)
        stds.append(torch.exp(0.5 * logvar))
    return Bank(torch.cat(means), torch.cat(stds))


@torch.no_grad()
def _psnr(vae: Any, pictures: torch.Tensor, posterior: Bank) -> float:
    """Of the decoded posterior means, through the public decode(), pictures in [0, 1]."""
    total = 0.0
    for i in range(0, len(pictures), 64):
        z = posterior.mean[i : i + 64][: len(pictures) - i]
        z = z[:, :, None] if isinstance(vae, qwen_vae.AutoencoderKLQwenImage) else z
        y = vae.decode(z, return_dict=False)[0].reshape(-1, 3, 128, 128)
        error = (y.clamp(-1, 1) + 1) / 2 - pictures[i : i + 64].float() / 255
        total += float(error.square().mean()) * len(y)
    return float(-10 * torch.log10(torch.tensor(total / len(pictures))))


def _edge_layers(vae: Any) -> tuple[Any, Any, bool]:
    """Layer that writes the moments, layer that reads latents, and whether both are 1 x 1."""
    if getattr(vae, "quant_conv", None) is not None:
        return vae.quant_conv, vae.post_quant_conv, True
    return vae.encoder.conv_out, vae.decoder.conv_in, False


@torch.no_grad()
def _move_latents(vae: Any, posterior: Bank) -> None:
    """Give latents the channel means and deviations that the model's constants promise."""
    writer, reader, _ = _edge_layers(vae)
    shift, scale = latent_affine(vae)
    variance, mean = torch.var_mean(posterior.mean, dim=(0, 2, 3))
    deviation = (variance + posterior.std.square().mean((0, 2, 3))).sqrt()
    gain = 1 / (scale * deviation)
    channels = len(gain)
    rest = [1] * (writer.weight.ndim - 1)
    writer.weight[:channels] *= gain.view(-1, *rest)
    writer.bias[:channels] = (writer.bias[:channels] - mean) * gain + shift
    writer.bias[channels:] += 2 * gain.log()
    offset = mean - shift / gain
    # A one-frame kernel's other time slices see zeros: only the last one carries the offset.
    slices = reader.weight[:, :, -1:] if reader.weight.ndim == 5 else reader.weight
    reader.bias += slices.flatten(2).sum(-1) @ offset
    reader.weight /= gain.view(1, -1, *rest[1:])
