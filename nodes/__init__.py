NODES = []
def register_model_folders(): pass
