"""A trained pair of target and EAGLE3 head on a live server: how many drafts are accepted.

Only here is a head neither random nor a copy of its target's last layer. Its drafts are right
as often as attention over all keys lets them be, so a fault that costs the head some of its
keys shows in the count. The head has a vocabulary of its own. `eval_draft.py` does the same
with more training, more prompts and plain servers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import distil_draft
from accepted_report import accepted
from eval_draft import PROMPT_TOKENS, SPECULATION, ask
from head_oracle import HeadOracle
from helpers.needs_sglang import needs_sglang
from helpers.servers import server
from helpers.speculation import speculating
from real_text import Ids, draw_sample, split_chapters
from speculation_drafts import flags_of
from trained_model import INSTALL, find_gguf

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    needs_sglang("0.5.23", "DCP serves the speculation of SGLang 0.5.23 on"),
]

NEW_TOKENS = 32
# Tokens of a verification. A random head has 1.0.
LEAST_ACCEPTED = 1.1
# Chunks end inside the prompts, and pages inside chunks.
COMMON = "--max-total-tokens 4096 --chunked-prefill-size 192 --page-size 4"
DCP = "--tp 2 --dcp-size 2 --dcp-comm-backend a2a --dcp-replicate-q-proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_gguf()
    except FileNotFoundError:
        pytest.skip(f"needs the wheel of a trained model (98 MB): {INSTALL}")
    folder = tmp_path_factory.mktemp("pair")
    # Of 500 updates in the script: hardly trained, but far from random.
    small = ["--blocks", "40", "--updates", "60"]
    return distil_draft.make_pair(distil_draft.parse([str(folder), *small]))


@pytest.fixture(scope="module")
def prompts(pair: Path) -> list[Ids]:
    from transformers import AutoTokenizer

    sample = draw_sample(
        AutoTokenizer.from_pretrained(pair / "target"),
        texts=0,
        text_tokens=0,
        prompts=6,
        prompt_tokens=PROMPT_TOKENS,
        of=split_chapters()[1],
    )
    return sample.prompts


def test_as_many_drafts_are_accepted_as_by_torch(
    pair: Path, prompts: list[Ids], tmp_path: Path
) -> None:
    target, draft = pair / "target", pair / "draft"
    flags = " ".join([DCP, COMMON, *flags_of(SPECULATION, "eagle3", draft)])
    env = speculating(tmp_path, "EAGLE3")
    with server(target, flags, env, fresh=True) as dcp:
        replies = ask(dcp.base_url, prompts, NEW_TOKENS)
    oracle = HeadOracle(target, draft, SPECULATION.steps)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.ids == oracle.says(prompt, reply.ids)
        assert reply.verifications == oracle.verifications(prompt, reply.ids)
    print(f"{accepted(replies):.3f} tokens of a verification")
    assert accepted(replies) > LEAST_ACCEPTED


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
