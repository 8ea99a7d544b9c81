"""This project and the software it is compared with, each behind one interface.

A contender lives in a process of its own (`workers`), reads the same directory and
answers the same questions. Its imports stand inside it: what is not installed leaves
one contender out, not the benchmark.
"""

import logging
import os
import pathlib
from typing import Any

__all__ = ["KINDS", "Contender"]

Tokens = list[list[int]]


class Contender:
    """Software that continues prompts greedily and stops at no token."""

    def __init__(self, directory: str, dtype: str, threads: int, scratch: str):
        """Loads the model.

        Args:
          directory: Hugging Face directory.
          dtype: `"float32"`, `"bfloat16"` or `"int8"`.
          threads: Threads to compute with.
          scratch: Folder for converted files, deleted after the benchmark.
        """
        raise NotImplementedError

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        """Returns `count` new tokens of each prompt."""
        raise NotImplementedError

    def first(self, prompts: Tokens, count: int) -> Tokens:
        """Returns the first new token of each prompt.

        Args:
          prompts: As for `generate`.
          count: What `generate` is timed with, for what prepares for a length.
        """
        return self.generate(prompts, 1)

    def margin(self, tokens: list[int], ours: int, theirs: int) -> dict[str, float]:
        """Returns how close the choice after `tokens` is, for the reference only."""
        raise NotImplementedError


class Jaxllm(Contender):
    """This project, through its engine."""

    width = 1

    def __init__(self, directory: str, dtype: str, threads: int, scratch: str):
        from jaxllm.checkpoints import load_language_model
        from jaxllm.drafting import Autoregressive

        # Not `jaxllm.load`: its compile cache on disk would hide what a compile costs.
        self._lm = load_language_model(directory, dtype=dtype)
        self._params = {"target": self._lm.params, "drafter": {}}
        self._drafter = Autoregressive(query_width=self.width)

    def _chunks(self, prompts: Tokens, count: int, steps: int) -> Any:
        from jaxllm.decoding import Request, decode_chunks, make_sampler

        rows = len(prompts)
        request = Request(
            prompts=prompts,
            max_new_tokens=[count] * rows,
            sampler=make_sampler(rows),
            seeds=range(rows),
            steps_per_call=steps,
        )
        return decode_chunks(
            self._lm.model, self._params, request, drafter=self._drafter
        )

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        from jaxllm.decoding.decode import STEPS_PER_CALL, drain

        decoded = drain(self._chunks(prompts, count, STEPS_PER_CALL))
        return [output.token_ids for output in decoded.outputs]

    def first(self, prompts: Tokens, count: int) -> Tokens:
        # The request of the whole run, left after one step: the same shapes.
        return next(self._chunks(prompts, count, 1)).token_ids


class WideJaxllm(Jaxllm):
    """This project with eight query rows in every pass, seven of them padding.

    What a pass over a draft of eight tokens costs, whatever is accepted of it.
    """

    width = 8


class HuggingFace(Contender):
    """`transformers` as it comes: eager execution, a cache that grows."""

    def __init__(self, directory: str, dtype: str, threads: int, scratch: str):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype)
        ).eval()
        # Greedy, and no token ends a row.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
        )
        self._options: dict[str, Any] = {}

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=count,
                **self._options,
            )
        return out[:, ids.shape[1] :].tolist()

    def margin(self, tokens: list[int], ours: int, theirs: int) -> dict[str, float]:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([tokens])).logits[0, -1].float()
        best = logits.topk(2).values
        return {
            "gap_between_choices": abs(float(logits[ours] - logits[theirs])),
            "top2_gap": float(best[0] - best[1]),
        }


class CompiledHuggingFace(HuggingFace):
    """`transformers` with its static cache and a compiled decode step."""

    def __init__(self, directory: str, dtype: str, threads: int, scratch: str):
        # What an earlier benchmark compiled would hide what a compile costs.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/inductor-{dtype}"
        super().__init__(directory, dtype, threads, scratch)
        from transformers import CompileConfig

        compiled = CompileConfig(mode="default", dynamic=False)
        # On a CPU transformers leaves compilation out unless told this way.
        compiled._compile_all_devices = True
        logging.getLogger("torch").setLevel(logging.ERROR)
        self._options = {
            "cache_implementation": "static",
            "compile_config": compiled,
        }


class CTranslate2(Contender):
    """CTranslate2, from its own converter."""

    def __init__(self, directory: str, dtype: str, threads: int, scratch: str):
        import ctranslate2
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        converted = pathlib.Path(scratch) / f"ctranslate2-{dtype}"
        ctranslate2.converters.TransformersConverter(directory).convert(
            str(converted), quantization="int8" if dtype == "int8" else None
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self._words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self._generator = ctranslate2.Generator(
            str(converted),
            device="cpu",
            compute_type=dtype,
            inter_threads=1,
            intra_threads=threads,
        )

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        results = self._generator.generate_batch(
            [[self._words[i] for i in prompt] for prompt in prompts],
            beam_size=1,
            max_length=count,
            min_length=count,  # The only way to say that no token ends a row.
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]


class LlamaCpp(Contender):
    """llama.cpp through its C interface, one row, keys and values in float32."""

    def __init__(self, directory: str, dtype: str, threads: int, scratch: str):
        import llama_cpp

        from benchmarks.gguf_model import write_gguf

        self._lib = llama_cpp
        path = pathlib.Path(scratch) / "model.gguf"
        write_gguf(pathlib.Path(directory), path)
        # Kept, or the library would call a function that is gone.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError("llama.cpp could not load the converted model")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 1024
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        lib, (row,) = self._lib, prompts
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        out: list[int] = []
        while len(out) < count:
            array = (lib.llama_token * len(row))(*row)
            batch = lib.llama_batch_get_one(array, len(row))
            if lib.llama_decode(self._context, batch):
                raise RuntimeError("llama.cpp could not decode")
            out.append(lib.llama_sampler_sample(self._sampler, self._context, -1))
            row = out[-1:]
        return [out]


KINDS: dict[str, type[Contender]] = {
    "jaxllm": Jaxllm,
    "jaxllm wide": WideJaxllm,
    "HF eager": HuggingFace,
    "HF compiled": CompiledHuggingFace,
    "CTranslate2": CTranslate2,
    "CTranslate2 int8": CTranslate2,
    "llama.cpp": LlamaCpp,
}
