"""`kubectl vmbackup`: administration of VMBackups, wherever kubectl works.

A zipapp, standard library only (plugins/build.py): each call to the API server is a call of kubectl, with its
kubeconfig, context and credentials. Of vmbackup it may import api and version, which are pure.

kubectl.py    runs kubectl
backup.py     reads VMBackups with it (the view of one is vmbackup/api/resource.py)
advice.py     the next step of the person who looks at one: pure
view.py       text from VMBackups: pure
policy.py     whether the VMBackupPolicies allow one
node.py       signs of life of a node and its agent
status.py, retry.py, cancel.py, check.py, forget.py    the commands
completion.py kubectl's protocol of plugin completion
"""
