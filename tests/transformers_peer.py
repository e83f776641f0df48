"""The decode side of a hand-off, in a process of its own: python transformers_peer.py MODEL TOKENS

Says in lines of JSON where it listens, and then what it received and what it made of it.
"""

import json
import sys

import torch
from transformers_models import greedy, make_model

from kvwire import Receiver
from kvwire.connectors.transformers import allocate, cache_memory, plan_cache, rebuild
from kvwire.demo.worker import digests

SECONDS_MAX = 60


def main(name, tokens):
    torch.set_num_threads(1)
    model = make_model(name)
    spec = plan_cache(model, tokens)
    tensors = allocate(spec, tokens)
    with Receiver("127.0.0.1:0") as receiver:
        ticket = receiver.expect(cache_memory(spec, tensors, tokens, writable=True),
                                 deadline_s=SECONDS_MAX)
        say(address=receiver.address, ticket=ticket.id)
        ticket.result(SECONDS_MAX)
    received = digests(tensors)
    with torch.no_grad():
        cache = rebuild(model, tensors, ticket.metadata)
        new_tokens, logits = greedy(model, cache, ticket.metadata["first_token"])
    say(tensors=received, tokens=new_tokens, logits=digests({(0, "logits"): logits}),
        weights=digests({(0, key): weight for key, weight in model.state_dict().items()}))


def say(**answer):
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
