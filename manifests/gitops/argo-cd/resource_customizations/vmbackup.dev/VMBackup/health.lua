-- The health of a VMBackup in Argo CD. Healthy: it can be restored and every disk is home (Ready=True).
-- Degraded: it has failed (Ready=False). Progressing: anything else.
local finalizers = obj.metadata.finalizers or {}
local status = obj.status or {}
local ready = {}
for _, condition in ipairs(status.conditions or {}) do
  if condition.type == "Ready" then
    ready = condition
  end
end

if obj.metadata.deletionTimestamp ~= nil then
  -- Argo CD holds a deleted hook, for example after its ttlSecondsAfterFinished, until it knows how the hook ended.
  local hook = false
  for _, finalizer in ipairs(finalizers) do
    hook = hook or finalizer == "argocd.argoproj.io/hook-finalizer"
  end
  if not hook then
    local held = #finalizers > 0 and "; held by " .. table.concat(finalizers, ", ") or ""
    return { status = "Progressing", message = "Pending deletion" .. held }
  end
elseif status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "Waiting for the agent of node " .. obj.spec.nodeName }
end

local message = ready.message or ""
if ready.reason ~= nil then
  message = ready.reason .. (message ~= "" and ": " .. message or "")
end
local healths = { True = "Healthy", False = "Degraded" }
return { status = healths[ready.status] or "Progressing", message = message }
