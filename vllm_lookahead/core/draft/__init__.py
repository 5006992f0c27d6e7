# SPDX-License-Identifier: Apache-2.0
"""The drafter: where drafts come from, what they are worth, what they may cost."""
