"""The loss of a run's evaluation is that of every document alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.training import DataConfig, Run, SourceConfig, open_data
from jaxllm.training.evaluation import evaluate_loss
from tests.training.small_data import SEPARATOR
from tests.training.small_run import small_config, write_files


@pytest.mark.parametrize("rows", [3, 8])
def test_the_loss_is_that_of_all_tokens_alike(tmp_path, rows) -> None:
    write_files(tmp_path)
    run = Run(small_config(tmp_path), tmp_path / "run")
    lm = run.lm
    run.close()
    texts = ["the cat saw", "a red ball ran to the tree and", "dog"]
    (tmp_path / "few.txt").write_text(f"\n{SEPARATOR}\n".join(texts))
    source = SourceConfig(path=str(tmp_path / "few.txt"), separator=SEPARATOR)
    data = DataConfig(
        sources=(source,),
        row_length=64,
        batch_rows=rows,
        epochs=1,
        packing="first_fit",
    )
    stream = open_data(data, lm.tokenizer, tmp_path / "cache")
    found = evaluate_loss(lm, stream)
    assert evaluate_loss(lm, stream) == found
    stream.close()
    total, right, count = 0.0, 0, 0
    for text in texts:
        ids = [*lm.tokenizer.encode(text), lm.tokenizer.eos_id]
        [logits] = jaxllm.logits(lm, [ids])
        log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits[:-1])))
        total -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
        right += int((log_p.argmax(-1) == np.asarray(ids[1:])).sum())
        count += len(ids) - 1
    assert found["eval/loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(right / count)
