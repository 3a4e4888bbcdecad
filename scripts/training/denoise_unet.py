"""Training loss of the two UNet pipelines: predict the noise, min-SNR weighted."""

from typing import Any

import torch
from assemble import Parts
from autoencoders import latent_affine
from bank import Bank

__all__ = ["UNetTask"]

DROP = 0.1  # share of prompts replaced by the empty one, for classifier-free guidance
MIN_SNR = 5.0  # Hang et al. 2023, "Efficient diffusion training via min-SNR weighting"


class UNetTask:
    """Draws batches and returns losses for sd15 and sdxl."""

    def __init__(self, parts: Parts, bank: Bank, prompts: list[str], batch: int) -> None:
        """Tokenize every prompt once; `bank` and `prompts` are in the same order."""
        self.parts, self.bank, self.batch = parts, bank, batch
        device = bank.mean.device
        self.ids = [self._ids(t, prompts).to(device) for t in parts.tokenizers.values()]
        self.empty = [self._ids(t, [""]).to(device) for t in parts.tokenizers.values()]
        config = parts.family.scheduler[1]
        root = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000)
        self.alphas = torch.cumprod(1 - root.square(), 0).to(device)
        shift, scale = latent_affine(parts.vae)
        self.shift, self.scale = shift.view(-1, 1, 1), scale.view(-1, 1, 1)

    def loss(self) -> torch.Tensor:
        """One batch's weighted mean squared error."""
        device = self.bank.mean.device
        index = torch.randint(len(self.bank.mean), (self.batch,), device=device)
        clean = (self.bank.draw(index) - self.shift) * self.scale
        noise = torch.randn_like(clean)
        t = torch.randint(1000, (self.batch,), device=device)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        context, added = self._context(index)
        found = self.parts.denoiser(noisy, t, context, added_cond_kwargs=added).sample
        snr = (alpha / (1 - alpha)).flatten()
        weight = snr.clamp(max=MIN_SNR) / snr
        return (weight * (found.float() - noise).square().mean((1, 2, 3))).mean()

    def _context(self, index: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any] | None]:
        drop = torch.rand(len(index), device=index.device)
        ids = [
            torch.where((drop < DROP)[:, None], empty, every[index])
            for every, empty in zip(self.ids, self.empty, strict=True)
        ]
        if len(ids) == 1:
            return self.parts.text_encoders[0](ids[0])[0], None
        # As StableDiffusionXLPipeline.encode_prompt: last but one hidden states, second pooled.
        first, second = (
            encoder(x, output_hidden_states=True)
            for encoder, x in zip(self.parts.text_encoders, ids, strict=True)
        )
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        # The pipeline's default for "no prompt" is zeros, an explicit "" is encoded: learn both.
        keep = (drop >= DROP / 2).to(context.dtype)
        sizes = torch.tensor([128, 128, 0, 0, 128, 128], device=index.device)
        added = {
            "text_embeds": second.text_embeds * keep[:, None],
            "time_ids": sizes.float().expand(len(index), -1),
        }
        return context * keep[:, None, None], added

    @staticmethod
    def _ids(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
        padded = tokenizer(prompts, padding="max_length", max_length=77, truncation=True)
        return torch.tensor(padded["input_ids"])
