"""The inputs of a decoder that is trained on given labels."""

import torch


def shift_labels_right(labels: torch.LongTensor, start: int | None, pad: int | None) -> torch.LongTensor:
    """`labels` `[B, N]` moved right by one behind the token `start`, with -100 as `pad`.

    Raises:
        ValueError: `start` or `pad` is None.
    """
    if start is None or pad is None:
        raise ValueError(
            "decoder_input_ids are made of labels with config.decoder_start_token_id and config.pad_token_id, got "
            f"{start} and {pad}"
        )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad)
