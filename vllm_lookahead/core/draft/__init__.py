# SPDX-License-Identifier: Apache-2.0
"""Where drafts come from, one file a source; what ranks them; what they may cost."""
