"""Training loss of the two transformer pipelines: predict the velocity of a rectified flow."""

import math
import random
from typing import Any

import torch
from assemble import Parts
from autoencoders import latent_affine
from bank import Bank

__all__ = ["FluxTask", "QwenTask"]

SHIFT = 1.6  # exp(0.47): both schedulers' dynamic shift at 64 picture tokens
GUIDANCE = 3.5  # FLUX.1-dev's guidance input; constant, so the model ignores its value
DROP = 0.1
# FluxPipeline pads T5 tokens to 512 by default and masks nothing, but callers choose other
# lengths: learn them all. (tokens, share of the batch, how often)
T5_LENGTHS = ((32, 1.0, 0.4), (64, 1.0, 0.2), (128, 0.5, 0.15), (256, 0.25, 0.1), (512, 0.16, 0.15))


class _FlowTask:
    def __init__(self, parts: Parts, bank: Bank, batch: int) -> None:
        self.parts, self.bank, self.batch = parts, bank, batch
        self.device = bank.mean.device
        shift, scale = latent_affine(parts.vae)
        self.shift, self.scale = shift.view(-1, 1, 1), scale.view(-1, 1, 1)

    def _noised(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed noisy latents (B, 64, 64), their velocity, and sigma (B,)."""
        clean = _pack((self.bank.draw(index) - self.shift) * self.scale)
        noise = torch.randn_like(clean)
        u = torch.sigmoid(torch.randn(len(index), device=self.device))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        s = sigma.view(-1, 1, 1)
        return (1 - s) * clean + s * noise, noise - clean, sigma

    def _index(self, share: float = 1.0) -> torch.Tensor:
        size = max(1, int(self.batch * share))
        return torch.randint(len(self.bank.mean), (size,), device=self.device)


class FluxTask(_FlowTask):
    """Flux: T5 tokens as context, the pooled CLIP vector and a constant guidance as modulation."""

    def __init__(self, parts: Parts, bank: Bank, prompts: list[str], batch: int) -> None:
        """Tokenize every prompt once; `bank` and `prompts` are in the same order."""
        super().__init__(parts, bank, batch)
        clip, t5 = parts.tokenizers.values()
        # CLIP is causal and its pooled vector sits on the end token: later padding never counts.
        self.clip_ids = _padded(clip, prompts, 24).to(self.device)
        self.t5_ids = _padded(t5, prompts, 512).to(self.device)
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(64, 3)
        self.img_ids = ids.float().to(self.device)

    def loss(self) -> torch.Tensor:
        """One batch's mean squared error."""
        length, share, _ = random.choices(T5_LENGTHS, [often for _, _, often in T5_LENGTHS])[0]
        index = self._index(share)
        noisy, velocity, sigma = self._noised(index)
        clip, t5 = self.parts.text_encoders
        found = self.parts.denoiser(
            hidden_states=noisy,
            timestep=sigma,
            guidance=torch.full_like(sigma, GUIDANCE),
            pooled_projections=clip(self.clip_ids[index]).pooler_output,
            encoder_hidden_states=t5(self.t5_ids[index, :length])[0],
            txt_ids=torch.zeros(length, 3, device=self.device),
            img_ids=self.img_ids,
            return_dict=False,
        )[0]
        return (found.float() - velocity).square().mean()


class QwenTask(_FlowTask):
    """Qwen-Image: hidden states of the language model, without the template's 34 first tokens."""

    def __init__(self, parts: Parts, bank: Bank, prompts: list[str], batch: int) -> None:
        """Tokenize every prompt once; `bank` and `prompts` are in the same order."""
        super().__init__(parts, bank, batch)
        from diffusers import QwenImagePipeline

        bare = QwenImagePipeline(
            scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None
        )
        self.template, self.skip = (
            bare.prompt_template_encode,
            bare.prompt_template_encode_start_idx,
        )
        tokenizer = parts.tokenizers["tokenizer"]
        head = tokenizer(self.template.split("{}")[0])["input_ids"]
        assert len(head) == self.skip, (len(head), self.skip)
        # All sentences have equally many tokens, so a batch needs neither padding nor a mask.
        self.ids = self._ids(tokenizer, prompts)
        self.empty = [self._ids(tokenizer, [text]) for text in ("", " ")]

    def loss(self) -> torch.Tensor:
        """One batch's mean squared error; every tenth batch has no prompt."""
        index = self._index()
        noisy, velocity, sigma = self._noised(index)
        if random.random() < DROP:
            ids = random.choice(self.empty).expand(len(index), -1)
        else:
            ids = self.ids[index]
        language = self.parts.text_encoders[0].model.language_model
        found = self.parts.denoiser(
            hidden_states=noisy,
            timestep=sigma,
            encoder_hidden_states=language(input_ids=ids).last_hidden_state[:, self.skip :],
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, 8, 8)]] * len(index),
            return_dict=False,
        )[0]
        return (found.float() - velocity).square().mean()

    def _ids(self, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
        rows = tokenizer([self.template.format(p) for p in prompts])["input_ids"]
        return torch.tensor(rows, device=self.device)


def _padded(tokenizer: Any, prompts: list[str], length: int) -> torch.Tensor:
    padded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True)
    return torch.tensor(padded["input_ids"])


def _pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, 16, 16) to (B, 64 tokens, 64): each token is a 2 x 2 patch, channels outermost."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, math.prod((c, 2, 2)))
