import torch, sys, tempfile
from types import SimpleNamespace
from mmrev_kit.config.reading import load_config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.model import fused
import mmrev_kit.model.scoring as S
from mmrev_kit.training.run import start
from mmrev_kit.training import update as U
S.takes_wanted=lambda m: False
dt,op,p=sys.argv[1:4]
tmp="/tmp/trajd"
w=f"model.name=/tmp/arch.json experiment.name=small data.num_main=8 data.num_control=8 data.dir={tmp} data.image_size=64 lora.r=8 lora.alpha=16 lora.dropout={p} lora.target_modules=[q_proj,k_proj,v_proj,o_proj] quantization.compute_dtype={dt} quantization.bits=4 retention.retention_ratio=0 training.batch_size=8 experiment.match_exposure=null launch.output_dir={tmp}/o training.learning_rate=1e-4 training.min_lr=1e-5 training.warmup_ratio=0"
c=load_config("configs/tiny_cpu.yaml",w); ensure_data(c)
state=SimpleNamespace(num_processes=1,process_index=0,is_main_process=True,device=torch.device("cpu"),wait_for_everyone=lambda:None)
run=start(c,state); run.model.train()
fused.can_compile=lambda d: op=="op"
cnt=[]; ap=fused.DecoderLayer.apply; fused.DecoderLayer.apply=staticmethod(lambda *a:(cnt.append(1),ap(*a))[1])
gen=torch.Generator().manual_seed(3)
rows=[s for part in run.task.train.values() for s in part]
perm=torch.randperm(len(rows),generator=gen)
L,N=[],[]
for u in range(int(sys.argv[4])):
    r=U.update(run,[rows[i] for i in perm[8*u:8*u+8]]); L.append(round(r["loss"],5)); N.append(round(r["grad_norm"],4))
print(dt,op,p,len(cnt),"loss",L,"norm",N,flush=True)
