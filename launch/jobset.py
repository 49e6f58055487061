"""Print the JobSet that gke.sh applies. Settings come from the environment; the arguments are for main.py.

A slice is a Job, a host is a pod. GKE sets the variables with which JAX finds the other hosts (TPU_WORKER_ID,
MEGASCALE_*). A failed pod or a preemption restarts the whole set, which resumes from its newest checkpoint.
"""

import json
import os
import sys

env = os.environ
hosts, chips = int(env["HOSTS"]), {"google.com/tpu": env["CHIPS_PER_HOST"]}
container = {
    "name": "train",
    "image": env["IMAGE"],
    # Kubernetes replaces $(NAME) in arguments, and $$ stands for a dollar.
    "command": ["python", "main.py", "--distributed", *(argument.replace("$", "$$") for argument in sys.argv[1:])],
    "env": [{"name": "LIBTPU_INIT_ARGS", "value": env["LIBTPU_INIT_ARGS"]}],
    "resources": {"requests": chips, "limits": chips},
}
pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": 300,  # SIGTERM saves a checkpoint
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": env["ACCELERATOR"],
        "cloud.google.com/gke-tpu-topology": env["TOPOLOGY"],
    },
    "containers": [container],
}
if env["NFS"]:
    server, path = env["NFS"].split(":", 1)
    pod["volumes"] = [{"name": "shared", "nfs": {"server": server, "path": path}}]
    container["volumeMounts"] = [{"name": "shared", "mountPath": "/shared"}]
job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "template": {"spec": pod}}
jobset = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
        "name": env["NAME"],
        # Places each slice in its own node pool.
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    },
    "spec": {
        "failurePolicy": {"maxRestarts": 100},
        "replicatedJobs": [{"name": "slice", "replicas": int(env["SLICES"]), "template": {"spec": job}}],
    },
}
print(json.dumps(jobset, indent=2))
