"""IntentQA: NExT-QA's CSV with `video_id` and further columns, and groups of its own."""

from vico.data.readers import nextqa

GROUPS = {"CW": "CW", "CH": "CH", "TP": "TP&TN", "TN": "TP&TN"}

annotation_file, read = nextqa.annotation_file, nextqa.read
