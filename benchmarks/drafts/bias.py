import torch, statistics as st, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
from mmrev_kit.config.reading import load_config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.model import fused
from mmrev_kit.training.run import prepare, start
from mmrev_kit.training import update as U
from mmrev_kit.model.loading import trainable
tmp=tempfile.mkdtemp()
p=sys.argv[1]
w=f"experiment.name=small data.num_main=4 data.num_control=4 data.dir={tmp} data.image_size=32 lora.r=8 lora.dropout={p} lora.target_modules=[q_proj,k_proj,v_proj,o_proj] quantization.compute_dtype=bf16 retention.retention_ratio=0 training.batch_size=8 experiment.match_exposure=null launch.output_dir={tmp}/o"
c=load_config("configs/tiny_cpu.yaml",w); ensure_data(c)
state=SimpleNamespace(num_processes=1,process_index=0,is_main_process=True,device=torch.device("cpu"),wait_for_everyone=lambda:None)
run=start(c,state); run.model.train()
gen=torch.Generator().manual_seed(3)
rows=[s for part in run.task.train.values() for s in part]
batch=[rows[i] for i in torch.randperm(len(rows),generator=gen)[:8]]
if len(sys.argv)>2:
    for q in trainable(run.model):
        if q.abs().sum()==0: q.data=0.02*torch.randn(q.shape,generator=gen)
cnt=[]; ap=fused.DecoderLayer.apply; fused.DecoderLayer.apply=staticmethod(lambda *a:(cnt.append(1),ap(*a))[1])
def measure(devices,seeds):
    fused.can_compile=lambda d: bool(devices); cnt.clear()
    out=[]
    for s in seeds:
        torch.manual_seed(s)
        loss=U.accumulate(run,batch)
        g=torch.cat([q.grad.flatten() for q in trainable(run.model)]); out.append((loss,g.norm().item(),g.clone()))
        for q in trainable(run.model): q.grad=None
    return out
import mmrev_kit.model.kernels as K

import mmrev_kit.model.scoring as S; S.takes_wanted=lambda m: False
N=60
for name,dev in (("modules",()),("operation",("cpu",))):
    o=measure(dev,range(100,100+N)); mean=sum(x[2] for x in o)/N
    print(p,name,"loss %.5f ± %.5f"%(st.mean(x[0] for x in o),st.stdev(x[0] for x in o)/N**.5),"norm %.5f ± %.5f"%(st.mean(x[1] for x in o),st.stdev(x[1] for x in o)/N**.5),"norm of mean gradient %.5f"%mean.norm().item(), flush=True)
    globals()[name]=mean; print("operations",len(cnt))
print("cos", torch.nn.functional.cosine_similarity(modules,operation,dim=0).item())
