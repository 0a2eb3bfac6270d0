"""World2VLM (arXiv 2604.26934): what an imagined camera motion teaches a policy, whole.

words.py, transitions.py, objects.py and questions.py make its questions of rooms, scans.py of scans; rewards.py judges
answers; train.py, train_rl.py and evaluate.py are its stages.
"""
