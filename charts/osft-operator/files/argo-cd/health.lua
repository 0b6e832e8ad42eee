-- Health of an OSFTJob for Argo CD: key resource.customizations.health.osft.dev_OSFTJob of the
-- ConfigMap argocd-cm. Healthy at the good end; a run that goes on is Progressing.
local health = { status = "Progressing", message = "the operator has not looked at it yet" }
local status = obj.status
if status == nil or status.phase == nil then
  return health
end
if status.observedGeneration ~= nil and obj.metadata.generation ~= nil
    and status.observedGeneration ~= obj.metadata.generation then
  health.message = "the operator has not seen the last change yet"
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end
local function is_true(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end
local function words(kind)
  local condition = conditions[kind]
  if condition == nil then
    return status.phase
  end
  if condition.message == nil or condition.message == "" then
    return condition.reason
  end
  return condition.reason .. ": " .. condition.message
end

if is_true("Complete") then
  return { status = "Healthy", message = words("Complete") }
end
if is_true("Failed") then
  return { status = "Degraded", message = words("Failed") }
end
-- it stands still, or it is refused and nothing of it runs
if is_true("Stalled") then
  return { status = "Degraded", message = words("Stalled") }
end
if status.phase == "Suspended" then
  return { status = "Suspended", message = words("Suspended") }
end
health.message = words("Ready")
if status.progress ~= nil and status.progress.summary ~= nil and status.phase == "Running" then
  health.message = status.progress.summary
end
return health
