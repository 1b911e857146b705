"""`kubectl vmbackup`: what an administrator does with VMBackups, from wherever kubectl works.

A zipapp of the standard library alone (plugins/build.py): each call to the API server is a call of kubectl, with its
kubeconfig, context and credentials. Of vmbackup it may import api and version, which are pure.

kubectl.py    kubectl, called as a program
backup.py     a VMBackup as the API server shows it
advice.py     what a human should do next about it: pure
view.py       how it is shown: pure
policy.py     whether the VMBackupPolicies allow it
node.py       the signs of life of the agent of a node
status.py, retry.py, cancel.py, check.py, forget.py    the commands
completion.py kubectl's protocol of plugin completion
"""
