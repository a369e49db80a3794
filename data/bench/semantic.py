"""ClassDiffusion's semantic preservation (arXiv 2405.17532): the phrase of the subject stays near
that of its category, by the cosine of their text features. It acts where text is trained, on the
new word (`--token-learning-rate`) or the text encoder.
"""

from torch.nn.functional import cosine_similarity


def regularizer(x_t, t, output, frozen):
    # The last place of a prompt has seen all of it.
    subject, category = frozen.subject.hidden[:, -1], frozen.category.hidden[:, -1]
    return 1 - cosine_similarity(subject, category, dim=-1)
