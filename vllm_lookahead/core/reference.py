# SPDX-License-Identifier: Apache-2.0
"""The operations as plain loops over single requests: what every kernel must equal."""

from vllm_lookahead.core import answers, compact, mask, update, verify, write
from vllm_lookahead.core.draft import grow


class ReferenceOps:
    """`LookaheadOps`, to be read and to be compared with; no engine runs it."""

    write_tokens = staticmethod(write.write_tokens)
    draft = staticmethod(grow.draft)
    ancestors = staticmethod(mask.ancestors)
    verify = staticmethod(verify.verify)
    compact = staticmethod(compact.compact)
    update = staticmethod(update.update)
    keep_answers = staticmethod(answers.keep_answers)
