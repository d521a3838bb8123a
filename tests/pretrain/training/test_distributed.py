"""Which errors mean that another rank is lost. What they say is what gloo of torch 2.15 says."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from pretrain.training.distributed import LostRank, lost_ranks_told

LOST = [
    RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"),
    RuntimeError("[/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 10000ms for send"),
    RuntimeError("Application timeout caused pair closure"),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistStoreError("wait timeout after 10000ms, keys: /default_pg/0//cpu//0/rank_1"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[-20:])
def test_an_error_of_communication_says_that_a_rank_is_lost(error):
    with pytest.raises(LostRank, match="rank 1 of 4 lost another rank.*--resume") as told, lost_ranks_told(1, 4):
        raise error
    assert told.value.__cause__ is error and told.value.exit_code == 3


@pytest.mark.parametrize(
    ("error", "world_size"), [(RuntimeError("shapes cannot be multiplied"), 4), (LOST[0], 1), (KeyError("gloo"), 4)]
)
def test_another_error_stays_as_it_is(error, world_size):
    with pytest.raises(type(error)) as same, lost_ranks_told(0, world_size):
        raise error
    assert same.value is error
